#!/usr/bin/env bash
# From nothing to an answer about a picture: bash examples/quickstart.sh [key=value ...]
#
# Makes .venv, installs what is missing, and takes easy-VQA (PyPI) through the whole way of a user on two CPU cores: prepare the
# data, train MGVQ, train HTC-VLM on four processes (PP 2 x DP 2, ZeRO-3), export to Hugging Face, evaluate the official test split,
# ask, draw the voco token's attention. key=value goes to the last stage of training, such as training.train_iters=100.
#
# Every run starts anew, so that its figures belong together; the run before it is kept as runs/quickstart.previous.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh

run=runs/quickstart
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore

if [ -e "$run" ]; then
    rm -rf "$run.previous"
    mv "$run" "$run.previous"
fi
mkdir -p "$run"

phase_number=0
phase() { # phase NAME HEADLINE COMMAND...: runs the command and notes its seconds
    local name="$1" headline="$2" began="$EPOCHREALTIME"
    shift 2
    phase_number=$((phase_number + 1))
    printf '\n== %d/10 %s\n' "$phase_number" "$headline"
    "$@"
    awk -v name="$name" -v began="$began" -v ended="$EPOCHREALTIME" \
        'BEGIN { printf "%s %.1f\n", name, ended - began }' >>"$run/phases.txt"
    printf '   %s s\n' "$(tail -n 1 "$run/phases.txt" | cut -d " " -f 2)"
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

picture="$run/data/test/0.png"

phase data "easy-VQA as LLaVA conversations, and a tokenizer of its words" \
    python examples/easy_vqa_to_llava.py "$run/data"
phase mgvq "Train MGVQ, the discrete image tokenizer" \
    python tools/train_mgvq.py --config pretrain/recipes/quickstart_mgvq.yaml num_workers=1
prepare() { # prepare NAME JSON [option ...]
    local name="$1" json="$2"
    shift 2
    python tools/prepare_data.py --data "$run/data/$json" --images "$run/data/train" --output "$run/data/$name" \
        --tokenizer "$run/data/tokenizer.model" --mgvq "$run/mgvq/mgvq.safetensors" --system-prompt "" "$@"
}
train() { # train NAME RECIPE [key=value ...]
    local name="$1" recipe="$2"
    shift 2
    torchrun --nproc-per-node 4 --master-addr 127.0.0.1 --master-port "$(free_port)" --log-dir "$run/logs/$name" \
        pretrain/pretrain_htc.py --config "pretrain/recipes/$recipe" "$@"
}
prepare_all() { # the first encodes every image, on both cores; the others take the codes from it
    OMP_NUM_THREADS=2 prepare instruct train.json
    prepare align align.json --codes-from "$run/data/instruct" >"$run/prepare.log" 2>&1 &
    local beside=$!
    prepare shapes shapes.json --codes-from "$run/data/instruct"
    wait "$beside" || {
        cat "$run/prepare.log" >&2
        return 1
    }
}

layout="4 processes, PP 2 x DP 2, ZeRO-3"
phase prepare "Tokenise the conversations and encode their images" prepare_all
phase align "Train on $layout: shapes, uncompressed" train align quickstart_align.yaml
phase shapes "Train on $layout: shapes, through one voco token" train shapes quickstart_shapes.yaml
phase instruct "Train on $layout: all questions, through one voco token" train instruct quickstart.yaml "$@"
phase export "Export to Hugging Face" \
    python tools/convert.py export "$run/checkpoints" "$run/hf" --system ""
phase evaluation "Evaluate the official test split through the exported model" \
    python tools/evaluate.py --model "$run/hf" --benchmarks easy_vqa --out "$run/evaluation"
phase ask "Ask: $picture, what shape is in the image?" \
    python tools/ask.py "$run/hf" --image "$picture" "what shape is in the image?"
phase attention "Draw the voco token's attention over anchors and patches" \
    python tools/attention_map.py "$run/hf" --image "$picture" --out "$run/attention.png"

python examples/quickstart_report.py "$run"

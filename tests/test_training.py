"""Runs from prepared data to checkpoint, resumption and export."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from htc_megatron.checkpoint.reader import CheckpointReader
from htc_megatron.config_io import load_config
from htc_megatron.data.loader import ValidationLoader
from htc_megatron.inference.answer import load as load_export
from htc_megatron.model.mask import VISUAL, token_kinds
from htc_megatron.weights.export import export
from tests.train_worker import logits_of, train
from tests.training_tiny import make_run

TP2_PP2 = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(
    "world_size, layout",
    [(4, [*PP2, "zero=zero3.json"]), (4, [*PP2, "zero=zero2.json", "training.precision=bf16"]), (2, ["zero=zero1.json"])],
    ids=["PP 2 x DP 2, ZeRO-3", "PP 2 x DP 2, ZeRO-2, bf16", "DP 2, ZeRO-1"],
)
def test_resumes_bit_for_bit(ranks, run, tmp_path, world_size, layout):
    """20 steps, and 10 + resume + 10 in new processes: the same losses and norms, all bits of them."""
    whole = [*layout, "training.train_iters=20", f"output_dir={tmp_path}/whole"]
    parts = [*layout, "training.train_iters=20", "training.save_interval=10", f"output_dir={tmp_path}/parts"]
    expected = ranks(world_size).run(train, str(run), whole)[0]
    assert ranks(world_size).run(train, str(run), parts)[0] == expected
    newest = tmp_path / "parts" / "checkpoints" / "step_00000020"
    older = newest.with_name("step_00000010")
    for file in newest.iterdir():  # as if the run had been stopped after step 10
        file.unlink()
    newest.rmdir()
    (older.parent / "latest").write_text(older.name)
    ranks(world_size).restart()
    assert ranks(world_size).run(train, str(run), parts)[0] == expected[10:]


def test_goes_on_on_another_layout(ranks, run, tmp_path):
    """10 steps on PP 2 x DP 2 with ZeRO-3, 10 on TP 2 with ZeRO-2: the losses of one process, to 1e-5."""
    common = ["training.train_iters=20", "training.save_interval=10"]
    reference = ranks(1).run(train, str(run), [*common, f"output_dir={tmp_path}/one"])[0]
    first = [*common, *PP2, "zero=zero3.json", f"output_dir={tmp_path}/two"]
    ranks(4).run(train, str(run), first)
    root = tmp_path / "two" / "checkpoints"
    for file in (root / "step_00000020").iterdir():
        file.unlink()
    (root / "step_00000020").rmdir()
    (root / "latest").write_text("step_00000010")
    second = [*common, "parallel.tensor_model_parallel_size=2", "zero=zero2.json", f"output_dir={tmp_path}/two"]
    for ours, theirs in zip(ranks(2).run(train, str(run), second)[0], reference[10:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_exported_model_computes_what_was_trained(ranks, run, tmp_path):
    """Trained at TP 2 x PP 2; the export, from the pictures themselves, gives the trained model's text logits to 1e-4 in fp32."""
    overrides = [*TP2_PP2, "zero=zero3.json", f"output_dir={tmp_path}/run", "training.train_iters=6"]
    ranks(4).run(train, str(run), overrides)
    answers = [answer for answer in ranks(4).run(logits_of, str(run), overrides) if answer is not None]
    assert all(torch.equal(answer[1], answers[0][1]) for answer in answers)  # TP ranks of the last stage
    ids, logits = answers[0]

    export(CheckpointReader(tmp_path / "run" / "checkpoints"), tmp_path / "hf", system="Look.")
    model, processor = load_export(tmp_path / "hf")
    config = load_config(run, overrides)
    batch = next(iter(ValidationLoader(config, config.data.validation, 0, 1, True, 1)))[0]
    assert torch.equal(batch.input_ids, ids)
    pictures = [Image.open(path) for path in sorted((run.parent / "source" / "images").iterdir())]
    prepared = processor.image_processor(pictures, return_tensors="pt")
    kinds = token_kinds(batch.layout)[0]
    compared, image = 0, 0
    for index, (row, start, stop) in enumerate(batch.layout.samples.tolist()):
        count = int((batch.layout.images[:, 0] == index).sum())
        which = [_picture(prepared["pixel_values"], pixels) for pixels in batch.pixel_values[image : image + count]]
        image += count
        text = kinds[row, start:stop] != VISUAL  # the export's ids hold voco and text tokens alone
        inputs = {"input_ids": batch.input_ids[row, start:stop][text][None]}
        if count:
            inputs |= {name: prepared[name][which] for name in ("pixel_values", "mgvq_pixel_values")}
        with torch.no_grad():
            ours = model(**inputs).logits[0]
        voco = (inputs["input_ids"][0] == config.model.method.voco_token_id)[:, None]
        theirs = logits[row, start:stop][text]
        torch.testing.assert_close(ours.masked_fill(voco, 0), theirs.masked_fill(voco, 0), atol=1e-4, rtol=0)
        compared += 1
    assert compared > 3 and image > 3


def _picture(prepared: torch.Tensor, pixels: torch.Tensor) -> int:
    """Number of the picture that these pixels were made from."""
    (found,) = [i for i, other in enumerate(prepared) if torch.equal(other, pixels)]
    return found


BAD_RUNS = {
    "heads over TP": (["parallel.tensor_model_parallel_size=8"], 8, "num_attention_heads"),
    "layers over PP": (["parallel.pipeline_model_parallel_size=3"], 3, "num_layers"),
    "world size": (["parallel.pipeline_model_parallel_size=2"], 1, "world size|processes|WORLD_SIZE"),
    "fp16": (["training.precision=fp16"], 1, "fp16"),
    "unknown key": (["training.learning_rate=1"], 1, "learning_rate"),
    "wrong type": (["training.train_iters=many"], 1, "train_iters"),
    "ZeRO-0": (["zero=nowhere.json"], 1, "nowhere.json"),
    "no data": (["data.train=nowhere"], 1, "nowhere"),
    "no MGVQ": (["mgvq_checkpoint="], 1, "mgvq_checkpoint"),
    "another codebook": (["model.mgvq.codebook_size=64"], 1, "codebook|mgvq"),
    "no tokenizer match": (["model.backbone.vocab_size=99", "model.method.voco_token_id=98"], 1, "vocab|token"),
    "no checkpoint": (["init_from=nowhere"], 1, "nowhere"),
    "evaluation without data": (["training.eval_interval=2", "data.validation="], 1, "data.validation"),
    "reduce once in bf16": (["parallel.reduce_once=true", "training.precision=bf16"], 1, "reduce_once"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_runs_end_with_a_sentence(run, tmp_path, case):
    """Status 2 and one sentence, before any process group is made and with nothing written."""
    overrides, world_size, wanted = BAD_RUNS[case]
    environment = os.environ | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    entry = Path(__file__).parent.parent / "pretrain" / "pretrain_htc.py"
    command = [sys.executable, str(entry), "--config", str(run), f"output_dir={tmp_path}/out", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2, done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("pretrain_htc:")]
    assert re.search(wanted, sentence), sentence
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_another_model_is_not_resumed(ranks, run, tmp_path):
    overrides = [f"output_dir={tmp_path}/run", "training.train_iters=2"]
    ranks(1).run(train, str(run), overrides)
    with pytest.raises(Exception, match="another model"):
        ranks(1).run(train, str(run), [*overrides, "model.backbone.rotary_base=500"])


@pytest.mark.parametrize("change", ["training.global_batch_size=8", "training.seq_length=400", "data.seed=4", "data.shuffle=false"])
def test_a_run_in_another_order_is_not_resumed(ranks, run, tmp_path_factory, change):
    """The data's position is the step number, so whatever decides the order must stay as it was."""
    folder = tmp_path_factory.getbasetemp() / "one_order"
    overrides = [f"output_dir={folder}", "training.train_iters=1"]
    if not folder.exists():
        ranks(1).run(train, str(run), overrides)
    with pytest.raises(Exception, match=f"{change.split('=')[0]}: got .* wanted .*step_00000001"):
        ranks(1).run(train, str(run), [*overrides, "training.train_iters=2", change])

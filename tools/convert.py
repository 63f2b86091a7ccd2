"""Weights in and out: import Hugging Face models, export checkpoints, compare two models, say what a folder holds.

python tools/convert.py import vicuna-7b-v1.5 clip-vit-large-patch14-336 mgvq_f16c32_g8.pt runs/start
python tools/convert.py export runs/instruct/checkpoints runs/instruct/hf
python tools/convert.py verify runs/start vicuna-7b-v1.5
python tools/convert.py show runs/instruct/checkpoints
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from htc_megatron.checkpoint import CheckpointReader, CheckpointWriter
from htc_megatron.checkpoint.describe import describe
from htc_megatron.config import ConfigError, RunConfig
from htc_megatron.config_io import load_config
from htc_megatron.data.dataset import PreparedData
from htc_megatron.hf.processing_htc_vlm import SYSTEM_PROMPT, open_image
from htc_megatron.weights.export import DTYPES, STORED, export
from htc_megatron.weights.export_adapter import export_adapter
from htc_megatron.weights.export_backbone import export_backbone
from htc_megatron.weights.importing import plan_import
from htc_megatron.weights.listing import listing


def training_prompt(config: RunConfig) -> str:
    """The system prompt that the run's data were prepared with; Vicuna's where they are no longer there."""
    folder = config.data.train
    if not folder or not Path(folder).is_dir():
        print(f"the run's data ({folder or 'none'}) are not here: taking Vicuna's system prompt; --system sets another", file=sys.stderr)
        return SYSTEM_PROMPT
    return PreparedData(folder).index.template["system"]


def progress(items: Iterable) -> Iterable:
    return tqdm(items, unit=" tensors")


def run_import(a: argparse.Namespace) -> None:
    if Path(a.out).exists():
        raise ConfigError(f"{a.out} exists already; wanted a new folder to import to")
    base = load_config(a.config, a.set)
    plan = plan_import(a.sources, base, tokenizer=a.tokenizer, voco_token_id=a.voco_token_id, new=a.new, draw=a.draw, seed=a.seed)
    for part, origin in plan.origins.items():
        print(f"{part}: {origin}")
    with CheckpointWriter(a.out, plan.config, extra={"imported": plan.origins}) as writer:
        for name, tensor in tqdm(plan.tensors(), total=len(plan), unit=" weights"):
            writer.add(name, tensor)
    print(f"{writer.folder}: {len(plan)} weights; its config.yaml holds the model section for a run that starts with init_from={a.out}")


def run_export(a: argparse.Namespace) -> None:
    reader = CheckpointReader(a.checkpoint)
    if a.dtype is None and reader.manifest.optimizer_step is None:
        a.dtype = STORED  # imported, not trained: what goes out is what came in
    if a.part.endswith("adapter"):
        written = export_adapter(reader, a.out, a.base, a.part != "adapter", a.dtype or "fp32", progress)
    elif a.part == "backbone":
        written = export_backbone(reader, a.out, a.tokenizer, a.dtype, a.merge, progress=progress)
    else:
        system = training_prompt(reader.config) if a.system is None else a.system
        written = export(reader, a.out, a.mgvq, a.tokenizer, a.dtype, system, a.merge, progress=progress)
    print(f"{written.folder}: {written.num_tensors} tensors, {written.num_parameters:,} parameters, {len(written.files)} file(s)")


def run_verify(a: argparse.Namespace) -> int:
    from htc_megatron.evaluation.compare import compare_logits, compare_tensors, open_model, report  # seconds, for transformers' models

    one, other = open_model(a.a), open_model(a.b)
    found = compare_tensors(one, other, progress)
    if a.logits:
        picture = open_image(a.image) if a.image else Image.effect_noise((336, 336), 80).convert("RGB")
        found.logits = compare_logits(one, other, picture, a.mgvq)
    for line in report(found, a.tolerance):
        print(line)
    return 0 if found.same(a.tolerance) else 1


def run_show(a: argparse.Namespace) -> None:
    for line in describe(CheckpointReader(a.checkpoint)):
        print(line)


def run_table(a: argparse.Namespace) -> None:
    print(listing(), end="")


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(dest="command", required=True)

    command = commands.add_parser("import", help="make a checkpoint of Hugging Face folders, mm_projector.bin, MGVQ's .pt")
    command.add_argument("sources", nargs="+", help="folders and files; each part comes from the last one that has it")
    command.add_argument("out", help="folder of checkpoints to write; must not exist")
    run = "YAML of the run, and others laid over it: the method's choices, and sizes of what no source has (default: the paper's)"
    command.add_argument("--config", nargs="+", help=run)
    command.add_argument("--set", nargs="+", default=[], metavar="key=value", help="dotted keys on top, e.g. model.method.mask=none")
    command.add_argument("--tokenizer", help="sentencepiece .model or transformers folder (default: the backbone's own, else the YAML's)")
    command.add_argument("--voco-token-id", type=int, help="default: the tokenizer's <voco>, else the first row behind the vocabulary")
    command.add_argument("--new", choices=("mean", "random"), default="mean", help="how the voco row and the anchors' projector begin")
    command.add_argument("--draw", nargs="+", default=[], choices=("backbone", "vision", "codebook"), help="parts to draw at random")
    command.add_argument("--seed", type=int, default=0, help="of what is drawn")
    command.set_defaults(run=run_import)

    command = commands.add_parser("export", help="write safetensors, configuration, processor and modelling code")
    command.add_argument("checkpoint", help="checkpoint folder, or the folder of checkpoints whose latest is taken")
    command.add_argument("out", help="folder to write; must not exist")
    parts = "all of it (default), the plain language model alone, or LoRA's adapters in peft's format for either of these"
    command.add_argument("--part", choices=("model", "backbone", "adapter", "backbone-adapter"), default="model", help=parts)
    command.add_argument("--no-merge", dest="merge", action="store_false", help="leave LoRA's adapters out: what they are adapters of")
    command.add_argument("--base", default="", help="folder of that model, written down in the adapter's configuration")
    command.add_argument("--mgvq", help="MGVQ file that the codes were made with (default: the run's mgvq_checkpoint)")
    command.add_argument("--tokenizer", help="sentencepiece .model or transformers folder (default: the run's tokenizer)")
    command.add_argument(
        "--dtype", choices=(*DTYPES, STORED), help="type of the weights (default: the run's precision; as stored if imported)"
    )
    command.add_argument("--system", help="system prompt of the chat template (default: that of the run's training data)")
    command.set_defaults(run=run_export)

    command = commands.add_parser("verify", help="compare two models, checkpoints or Hugging Face folders; exit status 1: they differ")
    command.add_argument("a", help="checkpoint or Hugging Face folder")
    command.add_argument("b", help="the same")
    command.add_argument("--image", help="picture for the logits (default: noise)")
    command.add_argument("--mgvq", help="MGVQ file of a checkpoint (default: its run's)")
    command.add_argument("--tolerance", type=float, default=1e-4, help="greatest difference of a logit in fp32")
    command.add_argument("--no-logits", dest="logits", action="store_false", help="tensors alone: memory stays bounded by the largest")
    command.set_defaults(run=run_verify)

    command = commands.add_parser("show", help="say what a checkpoint holds")
    command.add_argument("checkpoint", help="checkpoint folder, or the folder of checkpoints whose latest is taken")
    command.set_defaults(run=run_show)

    command = commands.add_parser("table", help="print the table of weights as Markdown")
    command.set_defaults(run=run_table)
    return whole


def main() -> int:
    a = parser().parse_args()
    try:
        return a.run(a) or 0
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

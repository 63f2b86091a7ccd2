"""Convert a checkpoint to a Hugging Face folder: `python tools/convert.py export runs/quickstart/checkpoints runs/quickstart/hf`."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from htc_megatron.checkpoint.reader import CheckpointReader
from htc_megatron.config import ConfigError, RunConfig
from htc_megatron.data.dataset import PreparedData
from htc_megatron.hf.processing_htc_vlm import SYSTEM_PROMPT
from htc_megatron.weights.export import DTYPES, export


def training_prompt(config: RunConfig) -> str:
    """The system prompt that the run's data were prepared with; Vicuna's where they are no longer there."""
    folder = config.data.train
    if not folder or not Path(folder).is_dir():
        print(f"the run's data ({folder or 'none'}) are not here: taking Vicuna's system prompt; --system sets another", file=sys.stderr)
        return SYSTEM_PROMPT
    return PreparedData(folder).index.template["system"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write safetensors, configuration, processor and modelling code")
    command.add_argument("checkpoint", help="checkpoint folder, or the folder of checkpoints whose latest is taken")
    command.add_argument("out", help="folder to write; must not exist")
    command.add_argument("--mgvq", help="MGVQ file that the codes were made with (default: the run's mgvq_checkpoint)")
    command.add_argument("--tokenizer", help="sentencepiece .model or transformers folder (default: the run's tokenizer)")
    command.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: the run's precision)")
    command.add_argument("--system", help="system prompt of the chat template (default: that of the run's training data)")
    a = parser.parse_args()
    try:
        reader = CheckpointReader(a.checkpoint)
        system = training_prompt(reader.config) if a.system is None else a.system
        written = export(reader, a.out, a.mgvq, a.tokenizer, a.dtype, system, progress=lambda x: tqdm(x, unit=" tensors"))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{written.folder}: {written.num_tensors} tensors, {written.num_parameters:,} parameters, {len(written.files)} file(s)")


if __name__ == "__main__":
    main()

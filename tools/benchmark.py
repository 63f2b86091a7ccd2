"""Measure what things cost, on the machine at hand: `python tools/benchmark.py COMMAND`, or under torchrun.

Peers are measured in the same run, in turn with ours; figures are medians. With OMP_NUM_THREADS below the number of cores, one is
left for what runs beside training.
"""

import argparse
import importlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path

from htc_megatron.config import ConfigError

COMMANDS = {  # each is htc_megatron/benchmarks/<name>.py
    "attention": "M_hy by its exact split beside SDPA with the dense mask and plain causal SDPA",
    "train": "a training step beside transformers' LLaMA and mcore's GPTModel with the dense mask",
    "gpu": "one GPU: right, how fast, how much memory, and the peers beside it; runs on CPU at --sizes tiny",
    "save": "a blocking save, and what a save in a thread takes from training",
    "zero": "ZeRO-3 under 1F1B: bytes sent against the least possible, a step's time against ZeRO-1",
    "scale": "memory, seconds and tokens a second of a step as data-parallel ranks are added, ZeRO-3 beside ZeRO-1",
    "plan": "memory a rank and step time that the planner foretells, beside the measured ones of real processes",
    "latency": "a question to HTC-VLM part by part: preparing, MGVQ, tower, projectors, compression, prefill, steps of decoding",
    "generate": "a question on a compressed image beside uncompressed LLaVA: seconds, their parts, and the floor",
    "data": "preparing images beside the encoder's bound, the loader, and how long training waits for it",
    "faults": "runs killed at random and begun again, against the same left in peace: bit for bit",
    "convert": "import and export beside cp of the same bytes: seconds and peak memory",
}
FIRST = os.environ.get("RANK", "0") == "0"  # the rank that speaks


def say(sentence: str) -> None:
    if FIRST:
        print(sentence, file=sys.stderr)


def main() -> int:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="megatron")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = next((word for word in sys.argv[1:] if word in COMMANDS), None)
    for name, help_line in COMMANDS.items():
        command = commands.add_parser(name, help=help_line)
        if name == chosen:  # the others are not imported
            benchmark = importlib.import_module(f"htc_megatron.benchmarks.{name}")
            benchmark.add_arguments(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the table, the ratios and all figures there too")
    args = parser.parse_args()
    try:
        result = benchmark.run(args, say)
    except ConfigError as error:
        say(f"benchmark: {error}")
        return 2
    if FIRST:
        print(result.table())
        if args.json:
            args.json.write_text(json.dumps(result.record(args.command), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

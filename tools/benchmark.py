"""Measure what things cost, on the machine at hand: `python tools/benchmark.py save`, or under torchrun.

With OMP_NUM_THREADS below the number of cores, one is left for what runs beside training.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from htc_megatron.config import ConfigError
from htc_megatron.config_io import check, load_zero

FIRST = os.environ.get("RANK", "0") == "0"  # the rank that speaks

Rows = list[tuple[str, str]]  # what a figure is, and the figure


def say(sentence: str) -> None:
    if FIRST:
        print(sentence, file=sys.stderr)


def table(rows: Sequence[tuple[str, str]]) -> str:
    wide, narrow = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{name:{wide}}  {figure:>{narrow}}" for name, figure in rows)


def add_save(commands: Any) -> None:
    command = commands.add_parser("save", help="a blocking save, and what a save in a thread takes from training")
    command.add_argument("--parameters", type=float, default=200e6, help="of the model, about (default: %(default)g)")
    command.add_argument("--tp", type=int, default=1)
    command.add_argument("--pp", type=int, default=1)
    command.add_argument("--zero", default="zero1.json", help="DeepSpeed JSON (default: %(default)s)")
    command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    command.add_argument("--seq-length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    command.add_argument("--micro-batches", type=int, default=1, help="of one row, on each data-parallel rank (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=5, help="figures are medians over them (default: %(default)s)")
    command.add_argument("--folder", type=Path, help="where checkpoints are written and removed again; all ranks see it (default: TMPDIR)")
    command.set_defaults(run=run_save)


def run_save(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    from htc_megatron.benchmarks.saving import measure_saving
    from htc_megatron.benchmarks.workload import workload_config
    from htc_megatron.parallel import groups as process_groups

    world = process_groups.launched_world_size()
    shape = (args.tp, args.pp, max(1, world // (args.tp * args.pp)))
    config = workload_config(args.parameters, *shape, args.zero, args.precision, args.seq_length, args.micro_batches)
    check(config, world)
    folder = (args.folder or Path(tempfile.gettempdir())) / f"benchmark_save_{os.environ.get('MASTER_PORT', os.getpid())}"
    groups = process_groups.initialise(config.parallel, config.training.seed)
    try:
        found = measure_saving(config, load_zero(args.zero), groups, folder, args.rounds, say)
    finally:
        process_groups.destroy()
    late = sum(not one["outlasted"] for one in found["rounds"])
    rows = [
        ("parameters", f"{found['parameters']:,}"),
        ("checkpoint", f"{found['checkpoint_bytes'] / 2**20:.0f} MiB"),
        ("ranks x threads, cores", f"{found['ranks']} x {found['threads']}, {found['cpus']}"),
        ("load average before", f"{found['load']:.1f}"),
        ("training step", f"{found['step_s']:.3f} s"),
        ("blocking save", f"{found['blocking_s']:.3f} s"),
        ("save in a thread: stall", f"{found['stall_s']:.3f} s"),
        ("save in a thread: writing", f"{found['write_s']:.3f} s"),
        (f"slow-down of the {found['steps_a_round']} steps beside it", f"{found['slowdown_s']:.3f} s"),
        ("the same in processor time of training's thread", f"{found['busy_slowdown_s']:.3f} s"),
        ("stall / blocking save", f"{found['stall_share']:.1%}"),
        ("(stall + slow-down) / blocking save", f"{found['cost_share']:.1%}"),
        ("the same for each of these steps", f"{found['step_cost_share']:.1%}"),
    ]
    if late:
        rows.append(("rounds in which writing outlasted the steps", f"{late} of {args.rounds}"))
    return rows, found


def add_convert(commands: Any) -> None:
    command = commands.add_parser("convert", help="import and export beside cp of the same bytes: seconds and peak memory")
    command.add_argument("--size", choices=("7b", "1b", "tiny"), default="7b", help="of the synthetic LLaMA (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=3, help="seconds are medians over them (default: %(default)s)")
    command.add_argument("--folder", type=Path, help="where files are written and removed again, four times the model (default: TMPDIR)")
    command.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    from htc_megatron.benchmarks.converting import measure_converting

    folder = (args.folder or Path(tempfile.gettempdir())) / f"benchmark_convert_{os.getpid()}"
    found = measure_converting(Path(__file__).with_name("convert.py"), folder, args.size, args.rounds, say)
    rows = [("synthetic files", f"{found['source_bytes'] / 2**30:.2f} GiB")]
    for name, seconds in found["seconds"].items():
        peak = found["peak_resident_bytes"][name]
        rows.append((name, f"{seconds:.1f} s, {peak / 2**30:.2f} GiB resident at most"))
    rows += [("import / cp", f"{found['import_over_cp']:.2f}"), ("export / cp of the checkpoint", f"{found['export_over_cp']:.2f}")]
    return rows, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_save, add_convert):
        add(commands)
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    args = parser.parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="megatron")
    try:
        rows, found = args.run(args)
    except ConfigError as error:
        say(f"benchmark: {error}")
        return 2
    if FIRST:
        print(table(rows))
        if args.json:
            args.json.write_text(json.dumps({"command": args.command, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

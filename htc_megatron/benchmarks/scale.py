"""A step on layouts of growing size, the same work a data-parallel rank: memory, seconds and tokens a second of each."""

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import linear_regression, median
from typing import Any

from htc_megatron.benchmarks.memory import allocated, peak_allocated
from htc_megatron.benchmarks.processes import in_processes
from htc_megatron.benchmarks.result import Result, Say
from htc_megatron.benchmarks.workload import num_parameters, random_batch, workload_config
from htc_megatron.benchmarks.zero import quiet, seconds
from htc_megatron.config import ConfigError, RunConfig
from htc_megatron.config_io import check, load_zero
from htc_megatron.parallel import groups as process_groups
from htc_megatron.parallel.groups import Groups
from htc_megatron.parallel.support import Layout
from htc_megatron.training.build import build_engine
from htc_megatron.training.step import train_step

LAYOUTS = tuple(Layout(dp=dp, zero=zero) for zero in (3, 1) for dp in (1, 2, 4))
BUCKET = 1_000_000  # elements of the gradients' buffer: of the size for a GPU it would outweigh a small model


def zero_of(layout: Layout, live: int) -> dict:
    """The DeepSpeed JSON of a layout. live: parameters whole at a time under ZeRO-3, small ones not excepted."""
    zero = load_zero(f"zero{layout.zero}.json")
    zero["zero_optimization"]["reduce_bucket_size"] = BUCKET
    if layout.zero == 3:
        zero["zero_optimization"] |= {"stage3_max_live_parameters": live, "stage3_param_persistence_threshold": 0}
    return zero


def measure(
    config: RunConfig, layout: Layout, live: int, steps: int, beside: Callable[[Groups], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Called by every rank of a layout, in new processes. beside: what is measured in them too, after the steps.

    held_mib: allocated between two steps, less what was before the engine was built. peak_mib: the same at most within a step.
    step_s: of each step after the first, which makes the optimiser's state.
    """
    quiet()
    groups = process_groups.initialise(config.parallel, config.training.seed)
    try:
        share = config.training.global_batch_size // config.training.micro_batch_size // groups.dp_size
        batches = [random_batch(config, 1000 * groups.dp_rank + i, groups.first_stage) for i in range(share)]
        gc.collect()
        before = allocated()
        engine = build_engine(config, zero_of(layout, live), groups)

        def step() -> None:
            train_step(engine, batches, config.optimizer.lr)

        step()
        with peak_allocated() as peak:
            step()
        gc.collect()
        held = allocated()
        times = [seconds(step, groups) for _ in range(steps)]
        engine.destroy()
        more = beside(groups) if beside else {}
    finally:
        process_groups.destroy()
    return {"held_mib": held - before, "peak_mib": peak.mib - before, "step_s": times} | more


def layout_of(word: str) -> Layout:
    """TP,PP,DP,ZeRO as four numbers with commas."""
    try:
        tp, pp, dp, zero = (int(number) for number in word.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {word!r}, wanted TP,PP,DP,ZeRO such as 1,2,2,3") from None
    return Layout(tp, pp, dp, zero)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--layouts", type=layout_of, nargs="+", default=LAYOUTS, metavar="TP,PP,DP,ZERO", help="default: DP 1, 2, 4")
    command.add_argument("--parameters", type=float, default=45e6, help="of the model, about (default: 45e6)")
    command.add_argument("--seq-length", type=int, default=96, help="tokens of a row (default: %(default)s)")
    command.add_argument("--micro-batches", type=int, default=2, help="of one row, on each data-parallel rank (default: %(default)s)")
    command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    command.add_argument("--live", type=int, default=0, help="parameters whole at a time under ZeRO-3 (default: no more than a layer)")
    command.add_argument("--steps", type=int, default=3, help="that are timed; figures are medians over them (default: %(default)s)")


def run(args: argparse.Namespace, say: Say) -> Result:
    """Starts the processes of one layout after the other. Raises ConfigError."""
    found: list[tuple[Layout, list[dict[str, Any]]]] = []
    for layout in args.layouts:
        if layout.zero not in (1, 2, 3):
            raise ConfigError(f"--layouts: got ZeRO {layout.zero}, wanted 1, 2 or 3")
        zero, sizes = f"zero{layout.zero}.json", (layout.tp, layout.pp, layout.dp)
        config = workload_config(args.parameters, *sizes, zero, args.precision, args.seq_length, args.micro_batches)
        check(config, layout.world_size)
        say(str(layout))
        found.append((layout, in_processes(layout.world_size, measure, config, layout, args.live, args.steps)))
    return summary(found, args.seq_length * args.micro_batches, num_parameters(config.model))


def memory_fit(sizes: Sequence[int], peaks: Sequence[float]) -> tuple[float, float, float]:
    """peak = a / size + b by least squares: a, b, and the largest difference from it as a share of the peak."""
    a, b = linear_regression([1 / size for size in sizes], peaks)
    return a, b, max(abs(a / size + b - peak) / peak for size, peak in zip(sizes, peaks, strict=True))


def summary(found: list[tuple[Layout, list[dict[str, Any]]]], tokens: int, parameters: int) -> Result:
    """The table. tokens: of one data-parallel rank in a step."""
    rows = [("parameters", f"{parameters:,}")]
    figures: list[dict[str, Any]] = []
    for layout, ranks in found:
        step = median(ranks[0]["step_s"])
        one = {"layout": asdict(layout), "peak_mib": max(rank["peak_mib"] for rank in ranks), "step_s": step, "ranks": ranks}
        one |= {"held_mib": max(rank["held_mib"] for rank in ranks), "tokens_per_s": layout.dp * tokens / step}
        figures.append(one)
        rows += [
            (f"{layout}: peak MiB, the largest rank", f"{one['peak_mib']:.0f}"),
            (f"{layout}: MiB between steps", f"{one['held_mib']:.0f}"),
            (f"{layout}: step, s", f"{step:.3f}"),
            (f"{layout}: tokens/s", f"{one['tokens_per_s']:.0f}"),
        ]
    ratios: dict[str, float] = {}
    for tp, pp, zero in dict.fromkeys((layout.tp, layout.pp, layout.zero) for layout, _ in found):
        peaks = {one.dp: f["peak_mib"] for (one, _), f in zip(found, figures, strict=True) if (one.tp, one.pp, one.zero) == (tp, pp, zero)}
        if len(peaks) < 3:  # two points lie on any line
            continue
        a, b, off = memory_fit(list(peaks), list(peaks.values()))
        name = f"TP {tp} x PP {pp}, ZeRO-{zero}"
        rows.append((f"{name}: peak MiB a rank", f"{a:.0f} / DP + {b:.0f}, off by {off:.1%} at most"))
        ratios[f"memory_residual_tp{tp}_pp{pp}_zero{zero}"] = off
        ratios[f"memory_dp{max(peaks)}_over_dp{min(peaks)}_tp{tp}_pp{pp}_zero{zero}"] = peaks[max(peaks)] / peaks[min(peaks)]
    return Result(rows, ratios, {"layouts": figures})

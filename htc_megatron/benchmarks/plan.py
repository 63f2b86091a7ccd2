"""What the planner foretells beside what real processes need: memory of the largest rank, and a step's time, layout by layout.

Every layout trains the same model on the same global batch. Products and messages are timed in each layout's own processes after its
steps, because on a machine with other work the rates differ from one minute to the next.
"""

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from htc_megatron.benchmarks.processes import in_processes
from htc_megatron.benchmarks.result import Result, Say
from htc_megatron.benchmarks.scale import measure, zero_of
from htc_megatron.benchmarks.workload import num_parameters, random_batch, workload_config
from htc_megatron.config import RunConfig
from htc_megatron.config_io import check
from htc_megatron.parallel.groups import Groups
from htc_megatron.parallel.support import Layout, refuse_untested
from htc_megatron.planner.hardware import Hardware, hardware
from htc_megatron.planner.search import Cluster, Plan, Planner
from htc_megatron.planner.trial import FakeWorld

LAYOUTS = (
    Layout(),
    Layout(recompute="full"),
    Layout(dp=2),
    Layout(dp=2, zero=2, recompute="full"),
    Layout(dp=2, zero=3),
    Layout(dp=4, zero=3),
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2),
    Layout(pp=4),
    Layout(pp=2, dp=2, zero=2),
    Layout(pp=2, dp=2, zero=3),
    Layout(tp=2, dp=2, zero=3, sequence_parallel=True, recompute="full"),
)
ROWS, SIZE = 4, 768  # rows of the global batch; side of the matrices that are timed
PIECE = 2**22  # bytes of a message that is timed


def rates(groups: Groups) -> dict[str, float]:
    """What this machine gives these ranks: FLOP/s of one while the others wait and of all at once, bytes/s and latency of messages."""
    a = torch.randn(SIZE, SIZE, device=groups.device)

    def products() -> float:
        count, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < 0.5:
            a @ a
            count += 1
        return 2 * SIZE**3 * count / passed

    dist.barrier()
    alone = torch.tensor(products() if groups.rank == 0 else 0.0, dtype=torch.float64)
    dist.barrier()
    together = torch.tensor(products(), dtype=torch.float64)
    for rate in (alone, together):
        dist.all_reduce(rate)

    def reduction(size: int, times: int) -> float:
        x = torch.ones(size // 4)
        dist.barrier()
        began = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(x)
        return (time.perf_counter() - began) / times

    n = groups.world_size
    latency = reduction(4, 20) / 2 if n > 1 else 1e-5
    link = 2 * (n - 1) / n * PIECE / max(1e-9, reduction(PIECE, 5) - 2 * latency) if n > 1 else 1e12
    return {"alone": float(alone), "together": float(together), "link": link, "latency": latency}


def with_rates(base: Hardware, found: dict[str, float]) -> Hardware:
    """This machine as it was in some processes. On GPUs the data sheet's figures stay."""
    if base.cores is None:
        return base
    cores = max(1.0, found["together"] / found["alone"])
    links = {"node_link": found["link"], "network": found["link"], "node_latency": found["latency"], "network_latency": found["latency"]}
    return replace(base, fp32=found["alone"], cores=cores, **links)


def configured(args: argparse.Namespace, layout: Layout) -> RunConfig:
    """The run of a layout: the same model and global batch for all."""
    sizes = (layout.tp, layout.pp, layout.dp)
    config = workload_config(args.parameters, *sizes, f"zero{layout.zero}.json", "fp32", args.seq_length, ROWS // layout.dp)
    config = replace(config, parallel=replace(config.parallel, sequence_parallel=layout.sequence_parallel, recompute=layout.recompute))
    check(config, layout.world_size)
    refuse_untested(config, layout.world_size, layout.zero)
    return config


def foretold(config: RunConfig, layout: Layout, machine: Hardware) -> Plan:
    """The plan of one layout, with the DeepSpeed JSON that `measure` takes for it."""
    zero = {layout.zero: zero_of(layout, 0)}
    planner = Planner(config, Cluster(1, layout.world_size, machine), lambda one: random_batch(one, 0, True), zero)
    with FakeWorld(layout.world_size) as world:
        return planner.plan(world, layout, config)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--parameters", type=float, default=45e6, help="of the model, about (default: 45e6)")
    command.add_argument("--seq-length", type=int, default=96, help="tokens of a row (default: %(default)s)")
    command.add_argument("--steps", type=int, default=3, help="that are timed; the fastest counts (default: %(default)s)")
    command.add_argument("--layouts", type=int, default=len(LAYOUTS), help="how many of the list are run (default: all %(default)s)")


def run(args: argparse.Namespace, say: Say) -> Result:
    """Starts the processes of one layout after the other."""
    machine = hardware("cpu")
    found = []
    for layout in LAYOUTS[: args.layouts]:
        config = configured(args, layout)
        ranks = in_processes(layout.world_size, measure, config, layout, 0, args.steps, rates)
        plan = foretold(config, layout, with_rates(machine, ranks[0]))
        found.append((plan, ranks))
        times = ", ".join(f"{seconds:.2f}" for seconds in ranks[0]["step_s"])
        say(
            f"{layout}: {plan.peak / 2**20:.0f} MiB foretold, {max(rank['peak_mib'] for rank in ranks):.0f} measured; "
            f"{plan.speed.step_s:.2f} s a step foretold, {times} measured"
        )
    return summary(found, num_parameters(configured(args, Layout()).model))


def noise(times: list[float]) -> float:
    """Share by which the steps of one layout differ."""
    return (max(times) - min(times)) / median(times)


def rank_correlation(foretold: list[float], measured: list[float], near: list[float]) -> float:
    """Spearman's, where a pair that differs by less than either's noise counts as a tie: such pairs take the foretold order."""
    order = sorted(range(len(measured)), key=lambda i: measured[i])
    for _ in order:  # neighbours within the noise are put in the foretold order
        for a in range(len(order) - 1):
            i, j = order[a], order[a + 1]
            if measured[j] / measured[i] - 1 < max(near[i], near[j]) and foretold[i] > foretold[j]:
                order[a], order[a + 1] = j, i
    place = {index: rank for rank, index in enumerate(order)}
    wanted = {index: rank for rank, index in enumerate(sorted(range(len(foretold)), key=lambda i: foretold[i]))}
    n = len(order)
    return 1 - 6 * sum((place[i] - wanted[i]) ** 2 for i in range(n)) / (n * (n * n - 1)) if n > 2 else 1.0


def summary(found: list[tuple[Plan, list[dict[str, Any]]]], parameters: int) -> Result:
    rows = [("parameters", f"{parameters:,}")]
    figures: list[dict[str, Any]] = []
    for plan, ranks in found:
        each = plan.layout.tp * plan.layout.dp
        of_stages = [max(rank["peak_mib"] for rank in ranks[i : i + each]) for i in range(0, len(ranks), each)]
        errors = [memory.peak / 2**20 / peak - 1 for memory, peak in zip(plan.memory, of_stages, strict=True)]
        error, step = max(errors, key=abs), min(ranks[0]["step_s"])
        one = {"foretold": plan.record(), "measured_peak_mib": of_stages, "error": error}
        figures.append(one | {key: ranks[0][key] for key in ("step_s", "alone", "together", "link", "latency")})
        rows += [
            (
                f"{plan.layout}: MiB a rank, foretold / measured",
                f"{plan.peak / 2**20:.0f} / {max(of_stages):.0f} ({error:+.1%} at the worst stage)",
            ),
            (f"{plan.layout}: s a step, foretold / measured", f"{plan.speed.step_s:.2f} / {step:.2f}"),
        ]
    times = [[one["foretold"]["step_s"] for one in figures], [min(one["step_s"]) for one in figures]]
    correlation = rank_correlation(*times, [noise(one["step_s"]) for one in figures])
    ratios = {"largest_memory_error": max(abs(one["error"]) for one in figures), "step_time_rank_correlation": correlation}
    return Result(rows, ratios, {"layouts": figures})

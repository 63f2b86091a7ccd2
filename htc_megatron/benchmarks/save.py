"""What a checkpoint costs training: written while training waits, and in a thread beside it."""

import argparse
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from htc_megatron.benchmarks.result import Result, Say
from htc_megatron.benchmarks.workload import num_parameters, random_batch, workload_config
from htc_megatron.checkpoint import CheckpointReader, HostBuffers, save, save_async
from htc_megatron.checkpoint.rng import rng_state
from htc_megatron.config import RunConfig
from htc_megatron.config_io import check, load_zero
from htc_megatron.parallel import groups as process_groups
from htc_megatron.parallel.groups import Groups
from htc_megatron.parallel.launch import discover
from htc_megatron.training.build import build_engine, checkpoint_state
from htc_megatron.training.step import train_step

KEYS = ("stall_s", "write_s", "blocking_s", "slowdown_s", "busy_slowdown_s", "cost_s")


def measure_saving(config: RunConfig, zero: dict, groups: Groups, folder: Path, rounds: int, say: Say) -> dict[str, Any]:
    """Called by every rank. `folder` is made for the checkpoints and removed.

    A round is: n undisturbed steps; a save in a thread and n steps beside it, n enough to outlast the writing; a blocking save.
    Parts of a round lie close together in time, so what else the machine does falls on all of them; figures are medians of
    the rounds. Seconds, of rank 0, which starts and ends every part together with the others:

    step_s: an undisturbed step. blocking_s: a blocking save. stall_s: until save_async returns. write_s: its thread.
    slowdown_s: the n steps beside the writing less the n undisturbed ones. busy_slowdown_s: the same in time that training's own
    thread ran on a processor, which shows what the writing takes from it through caches, memory and the interpreter's lock, but
    not that the two share a core, nor what other programs do.
    cost_s: stall and slow-down together: what the save took from training. cost_share, stall_share: of the blocking save;
    step_cost_share: of it, for each of the n steps.
    """
    load = os.getloadavg()[0]
    engine = build_engine(config, zero, groups)
    state, buffers = checkpoint_state(engine, config), HostBuffers()
    share = config.training.global_batch_size // config.training.micro_batch_size // groups.dp_size
    batches = [random_batch(config, 1000 * groups.dp_rank + i, groups.first_stage) for i in range(share)]

    def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
        """Seconds, seconds of this thread on a processor, and what `work` returned."""
        dist.barrier()
        began, busy = time.perf_counter(), time.thread_time()
        value = work()
        if groups.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter() - began, time.thread_time() - busy, value

    def steps(count: int) -> None:
        for _ in range(count):
            train_step(engine, batches, config.optimizer.lr)

    def save_arguments() -> dict[str, Any]:
        return {"step": 1, "config": config, "rng": rng_state(), "keep": 1, "group": groups.checkpoint}

    try:
        say("warming up")
        steps(2)
        for _ in range(2):  # the first copy finds its memory, which happens once in a run; the second overwrites it
            pending = save_async(folder, state, **save_arguments(), buffers=buffers)
            pending.wait()
        step, *_ = timed(lambda: steps(2))
        count = torch.tensor(math.ceil(2 * pending.seconds / (step / 2)) + 1, device=groups.device)
        dist.broadcast(count, 0)
        count = int(count)
        figures: list[dict[str, float]] = []
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: {count} steps, a save in a thread and {count} steps, a blocking save")
            undisturbed, alone, _ = timed(lambda: steps(count))
            stall, _, pending = timed(lambda: save_async(folder, state, **save_arguments(), buffers=buffers))
            disturbed, beside, _ = timed(lambda: steps(count))
            outlasted = pending.done
            pending.wait()
            blocking, _, path = timed(lambda: save(folder, state, **save_arguments()))
            one = {"undisturbed_s": undisturbed, "disturbed_s": disturbed, "stall_s": stall, "write_s": pending.seconds}
            one |= {"blocking_s": blocking, "slowdown_s": disturbed - undisturbed, "cost_s": stall + disturbed - undisturbed}
            figures.append(one | {"busy_slowdown_s": beside - alone, "outlasted": outlasted})
        size = sum(file.stat().st_size for file in CheckpointReader(path).folder.iterdir())
    finally:
        engine.destroy()
        dist.barrier()
        if groups.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    found = {key: median(one[key] for one in figures) for key in KEYS}
    return {
        "parameters": num_parameters(config.model),
        "checkpoint_bytes": size,
        "ranks": groups.world_size,
        "layout": {"tp": groups.tp_size, "pp": groups.pp_size, "dp": groups.dp_size, "zero_stage": engine.stage},
        "device": str(groups.device.type),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load,
        "steps_a_round": count,
        "step_s": median(one["undisturbed_s"] for one in figures) / count,
        **found,
        "stall_share": found["stall_s"] / found["blocking_s"],
        "cost_share": found["cost_s"] / found["blocking_s"],
        "step_cost_share": found["cost_s"] / count / found["blocking_s"],
        "rounds": figures,
    }


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--parameters", type=float, default=200e6, help="of the model, about (default: %(default)g)")
    command.add_argument("--tp", type=int, default=1)
    command.add_argument("--pp", type=int, default=1)
    command.add_argument("--zero", default="zero1.json", help="DeepSpeed JSON (default: %(default)s)")
    command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    command.add_argument("--seq-length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    command.add_argument("--micro-batches", type=int, default=1, help="of one row, on each data-parallel rank (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=5, help="figures are medians over them (default: %(default)s)")
    command.add_argument("--folder", type=Path, help="where checkpoints are written and removed again; all ranks see it (default: TMPDIR)")


def run(args: argparse.Namespace, say: Say) -> Result:
    """The figures of `measure_saving` for the model and layout asked for. Raises ConfigError."""
    world = discover().world_size
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
    return Result(rows, {name: found[name] for name in ("stall_share", "cost_share", "step_cost_share")}, found)

"""ZeRO-3 under 1F1B against ZeRO-1 on the same layout: what is sent, counted, against the least possible, and a step's time."""

import argparse
import gc
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from htc_megatron.benchmarks.counting import counted
from htc_megatron.benchmarks.memory import allocated, peak_allocated
from htc_megatron.benchmarks.processes import in_processes
from htc_megatron.benchmarks.result import Result, Say, alternated, median_ratio
from htc_megatron.benchmarks.workload import num_parameters, random_batch, workload_config
from htc_megatron.config import RunConfig
from htc_megatron.config_io import check, load_zero
from htc_megatron.model.layout import MicroBatch
from htc_megatron.parallel import groups as process_groups
from htc_megatron.parallel.gather import passes_of_1f1b
from htc_megatron.parallel.groups import Groups
from htc_megatron.parallel.zero import ZeroEngine
from htc_megatron.planner.speed import least_gathered
from htc_megatron.training.build import build_engine
from htc_megatron.training.step import train_step

FORMULA = (
    "bytes a rank must send in a step at the least: n data-parallel ranks, m micro-batches, L parameters whole at a time",
    "  (n-1)/n x parameters of the first forward, less frozen ones up to L; in each of the 2m-1 passes after it those it uses, less L",
    "  (n-1)/n x 4 bytes x the trained parameters: one reduction of the gradients",
    "  hidden states and their gradients, once a micro-batch, to the stages beside",
)


@dataclass(frozen=True)
class Setting:
    """A ZeRO stage, and the share of a stage's parameters that may be whole at a time under ZeRO-3."""

    name: str
    stage: int
    share: float = 1.0


SETTINGS = (Setting("ZeRO-1", 1), Setting("everything", 3, 1.0), Setting("half", 3, 0.5), Setting("nothing", 3, 0.0))


def zero_of(setting: Setting, stage_parameters: int) -> dict:
    """The DeepSpeed JSON of a setting; its buffer for gradients no larger than a small model's, which it would outweigh."""
    zero = load_zero(f"zero{setting.stage}.json")
    zero["zero_optimization"]["reduce_bucket_size"] = min(stage_parameters, 4_000_000)
    if setting.stage == 3:
        whole = {"stage3_max_live_parameters": math.ceil(setting.share * stage_parameters), "stage3_param_persistence_threshold": 0}
        zero["zero_optimization"] |= whole
    return zero


def least_sent(engine: ZeroEngine, config: RunConfig, micro_batches: int) -> dict[str, float]:
    """Bytes that this rank has to send in a step, at the least, by FORMULA. A frozen parameter counts for forwards alone, which
    is right where all frozen ones stand before the first trained one, as a frozen tower does."""
    groups, n = engine.groups, engine.groups.dp_size
    sizes = {p: math.ceil(p.ds_numel / n) * n for p in engine.module.parameters()}  # each is padded to equal shares
    whole, trained = sum(sizes.values()), sum(size for p, size in sizes.items() if p.requires_grad)
    passes = passes_of_1f1b(micro_batches, groups.pp_rank, groups.pp_size)
    limit = engine.gatherer.kept.numel + engine.gatherer.limit
    width = next(engine.module.parameters()).element_size()
    gathered = least_gathered(whole, trained, whole - trained, limit, passes)
    training = config.training
    message = training.micro_batch_size * training.seq_length * config.model.backbone.hidden_size * width
    neighbours = (groups.pp_rank > 0) + (groups.pp_rank < groups.pp_size - 1)
    return {
        "parameters": (n - 1) / n * width * gathered,
        "gradients": (n - 1) / n * 4 * trained,
        "hidden": float(micro_batches * neighbours * message),
    }


@dataclass
class Built:
    """An engine and its own batches."""

    engine: ZeroEngine
    batches: list[MicroBatch]
    lr: float

    def step(self) -> float:
        """One step. Returns its loss."""
        return train_step(self.engine, self.batches, self.lr).loss


def build(config: RunConfig, setting: Setting, groups: Groups, stage_parameters: int) -> Built:
    """The same model and batches whatever the setting."""
    engine = build_engine(config, zero_of(setting, stage_parameters), groups)
    share = config.training.global_batch_size // config.training.micro_batch_size // groups.dp_size
    batches = [random_batch(config, 1000 * groups.dp_rank + i, groups.first_stage) for i in range(share)]
    return Built(engine, batches, config.optimizer.lr)


def seconds(work: Callable[[], Any], groups: Groups) -> float:
    """Of one call that all ranks begin and end together."""
    dist.barrier()
    began = time.perf_counter()
    work()
    if groups.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - began


def measure(config: RunConfig, settings: Sequence[Setting], rounds: int) -> dict[str, Any]:
    """Called by every rank of a layout; what this rank found, by setting.

    losses: of the first steps. sent, least: bytes. calls: collectives and messages. by_kind: {kind: [calls, payload in bytes]}.
    reductions: how often a gradient was reduced in a step. most_whole, limit: parameters, in elements. peak_mib: the most that
    was allocated in a step, less what was before the engine was built. step_s: a step's seconds in each round.
    """
    quiet()
    groups = process_groups.initialise(config.parallel, config.training.seed)
    try:
        probe = build(config, Setting("probe", 1), groups, 4_000_000)
        stage_parameters = sum(p.numel() for p in probe.engine.module.parameters())
        probe.step()
        probe.engine.destroy()
        del probe
        found: dict[str, Any] = {setting.name: _alone(config, setting, groups, stage_parameters) for setting in settings}
        built = {setting.name: build(config, setting, groups, stage_parameters) for setting in settings}
        works = {name: (lambda one=one: seconds(one.step, groups)) for name, one in built.items()}
        for name, times in alternated(works, rounds).items():
            found[name]["step_s"] = times
            built[name].engine.destroy()
        return found
    finally:
        process_groups.destroy()


def quiet() -> None:
    """Keep the libraries' remarks out of the table."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="megatron")


def _alone(config: RunConfig, setting: Setting, groups: Groups, stage_parameters: int) -> dict[str, Any]:
    """What does not need the other settings beside it: counts, losses and memory."""
    gc.collect()
    before = allocated()
    one = build(config, setting, groups, stage_parameters)
    losses = [one.step(), one.step()]  # the first step learns the order of the passes
    with peak_allocated() as peak:
        losses.append(one.step())
    with counted() as traffic:
        losses.append(one.step())
    whole = traffic.of()
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in one.engine.module.parameters() if p.requires_grad)
    reduced = traffic.of("reduce-scatter", group=groups.dp).payload or traffic.of("all-reduce", group=groups.dp).payload
    found: dict[str, Any] = {
        "losses": losses,
        "sent": whole.sent,
        "calls": whole.calls,
        "by_kind": {kind: [traffic.of(kind).calls, traffic.of(kind).payload] for kind in sorted({kind for kind, _ in traffic.counts})},
        "reductions": reduced / (4 * trained),
        "peak_mib": peak.mib - before,
    }
    if setting.stage == 3:
        gatherer = one.engine.gatherer
        least = least_sent(one.engine, config, len(one.batches))
        found |= {"least": sum(least.values()), "least_parts": least, "limit": gatherer.limit, "most_whole": gatherer.most_live}
    one.engine.destroy()
    return found


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--parameters", type=float, default=11e6, help="of a model with 8 layers, about, which gives the width (default: 11e6)"
    )
    command.add_argument("--layers", type=int, default=16, help="of the backbone (default: %(default)s)")
    command.add_argument("--pp", type=int, default=2)
    command.add_argument("--dp", type=int, default=2)
    command.add_argument("--seq-length", type=int, default=96, help="tokens of a row (default: %(default)s)")
    command.add_argument("--micro-batches", type=int, default=4, help="of one row, on each data-parallel rank (default: %(default)s)")
    command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    command.add_argument("--rounds", type=int, default=7, help="figures are medians over them (default: %(default)s)")


def config_of(args: argparse.Namespace) -> RunConfig:
    """The run that is measured: one reduction of the gradients a step, in fp32."""
    config = workload_config(args.parameters, 1, args.pp, args.dp, "zero3.json", args.precision, args.seq_length, args.micro_batches)
    model = replace(config.model, backbone=replace(config.model.backbone, num_layers=args.layers))
    return replace(config, model=model, parallel=replace(config.parallel, reduce_once=args.precision == "fp32"))


def run(args: argparse.Namespace, say: Say) -> Result:
    """Starts pp x dp processes of its own. Raises ConfigError."""
    config = config_of(args)
    check(config, args.pp * args.dp)
    say(f"{args.pp * args.dp} processes, {len(SETTINGS)} settings, {args.rounds} rounds")
    ranks = in_processes(args.pp * args.dp, measure, config, SETTINGS, args.rounds)
    return summary(config, SETTINGS, ranks, f"PP {args.pp} x DP {args.dp}")


def summary(config: RunConfig, settings: Sequence[Setting], ranks: list[dict[str, Any]], layout: str) -> Result:
    """The table and the ratios from what the ranks found."""
    peer = settings[0].name
    total = {s.name: {key: sum(rank[s.name][key] for rank in ranks) for key in ("sent", "calls")} for s in settings}
    rows = [(line, "") for line in FORMULA]
    rows += [("layout", layout), ("parameters", f"{num_parameters(config.model):,}")]
    ratios: dict[str, float] = {}
    for setting in settings:
        mine = [rank[setting.name] for rank in ranks]
        name = f"{setting.name}: " if setting.stage == 1 else f"ZeRO-3, {setting.name} whole: "
        rows += [
            (name + "calls a step, a rank", f"{total[setting.name]['calls'] / len(ranks):.1f}"),
            (name + "MiB a step, a rank", f"{total[setting.name]['sent'] / len(ranks) / 2**20:.2f}"),
            (name + "peak MiB, the largest rank", f"{max(one['peak_mib'] for one in mine):.0f}"),
            (name + "step, s", f"{median(mine[0]['step_s']):.3f}"),
        ]
        if setting.stage == 3:
            least = sum(one["least"] for one in mine)
            rows.append((name + "least MiB a step, a rank", f"{least / len(ranks) / 2**20:.2f}"))
            ratios[f"bytes_over_least_{setting.name}"] = total[setting.name]["sent"] / least
            ratios[f"step_over_zero1_{setting.name}"] = median_ratio(mine[0]["step_s"], ranks[0][peer]["step_s"])
            differences = (abs(a - b) / abs(b) for a, b in zip(mine[0]["losses"], ranks[0][peer]["losses"], strict=True))
            ratios[f"loss_difference_{setting.name}"] = max(differences)
    ratios["bytes_over_least"] = max(ratio for name, ratio in ratios.items() if name.startswith("bytes_over_least"))
    ratios["step_over_zero1"] = ratios["step_over_zero1_everything"]
    return Result(rows, ratios, {"ranks": ranks})

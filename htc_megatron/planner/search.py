"""The layouts of a run on a number of devices, best first; where there is none, why, and what would do.

Every candidate is one that the project accepts: `check` and the support matrix are asked, not repeated. Candidates are put in the order
of a quick estimate that needs no trial, and trials are made from the fastest on, until as many fit as are wanted.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
import yaml

from htc_megatron.config import ConfigError, RunConfig
from htc_megatron.config_io import check, load_zero
from htc_megatron.model.layout import ImageShape, MicroBatch, SequenceLayout
from htc_megatron.model.stages import SAMPLE_PREFIX, SAMPLE_TEXT, Work, layers_of_stages
from htc_megatron.parallel.support import Layout, refuse_untested
from htc_megatron.planner.hardware import Hardware
from htc_megatron.planner.memory import Memory, memory_of
from htc_megatron.planner.speed import Speed, speed_of, work_of
from htc_megatron.planner.trial import Counted, FakeWorld
from htc_megatron.training.flops import step_flops

ZERO_FILES = {stage: f"zero{stage}.json" for stage in (1, 2, 3)}
RECOMPUTE = ("none", "selective", "full")
MICRO_BATCHES = (1, 2, 4)


class NoLayout(ConfigError):
    """Nothing fits; the sentence says why, and what would."""


@dataclass(frozen=True)
class Cluster:
    nodes: int
    per_node: int
    hardware: Hardware

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Plan:
    """A layout foretold. config: the run's, laid out so. memory, counted: of each stage. mfu: useful operations over the peak's."""

    layout: Layout
    micro_batch_size: int
    config: RunConfig
    layers: tuple[int, ...]
    counted: tuple[Counted, ...]
    memory: tuple[Memory, ...]
    speed: Speed
    mfu: float

    @property
    def worst(self) -> int:
        """The stage that needs most memory."""
        return max(range(len(self.memory)), key=lambda stage: self.memory[stage].peak)

    @property
    def peak(self) -> float:
        """Bytes of a rank of that stage."""
        return self.memory[self.worst].peak

    def overlay(self) -> str:
        """YAML that lays this plan over the run's configuration."""
        parallel, layout = self.config.parallel, self.layout
        keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel", "recompute")
        tree = {
            "parallel": {key: getattr(parallel, key) for key in keys},
            "training": {"micro_batch_size": self.micro_batch_size},
            "zero": self.config.zero,
        }
        header = (
            f"# {layout}, micro-batches of {self.micro_batch_size}, for {layout.world_size} ranks: "
            f"about {self.peak / 2**30:.1f} GiB a rank (stage {self.worst}), "
            f"{self.speed.step_s:.3g} s a step, MFU {self.mfu:.1%}, by tools/plan.py\n"
        )
        return header + yaml.safe_dump(tree, sort_keys=False)

    def record(self) -> dict[str, Any]:
        """What is written as JSON."""
        return {
            "layout": asdict(self.layout),
            "micro_batch_size": self.micro_batch_size,
            "layers_per_stage": list(self.layers),
            "memory": [asdict(memory) | {"peak": memory.peak} for memory in self.memory],
            "step_s": self.speed.step_s,
            "idle": list(self.speed.idle),
            "exchange_s": self.speed.exchange_s,
            "mfu": self.mfu,
        }


def packed_batch(config: RunConfig) -> MicroBatch:
    """Rows full of the samples that balanced stages are computed for: an image and SAMPLE_TEXT text tokens, half of them supervised.

    What is left at a row's end is text of the last sample. Without pixels' values: only shapes count.
    """
    image, rows, length = ImageShape.from_config(config.model), config.training.micro_batch_size, config.training.seq_length
    each = image.length + SAMPLE_TEXT
    count = max(1, length // each)
    starts = [i * each for i in range(count)] if length >= each else [0]
    prefix = min(SAMPLE_PREFIX, length - image.length - 1)
    samples, images = [], []
    ids = torch.ones(rows, length, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row in range(rows):
        for i, start in enumerate(starts):
            stop = length if i == len(starts) - 1 else start + each
            samples.append([row, start, stop])
            images.append([len(samples) - 1, start + prefix])
            answer = start + prefix + image.length + (stop - start - prefix - image.length) // 3
            labels[row, answer:stop] = 1
    layout = SequenceLayout(rows, length, torch.tensor(samples), torch.tensor(images), image)
    model = config.model
    pixels = torch.empty(len(images), 3, model.vision.image_size, model.vision.image_size) if model.has_tower else None
    codes = torch.zeros(len(images), model.mgvq.grid**2, model.mgvq.groups, dtype=torch.int16) if model.has_mgvq else None
    return MicroBatch(ids, labels, layout, pixels, codes)


class Planner:
    """Plans of one run. zero: DeepSpeed JSON by stage; by default the project's files, the run's own for its own stage."""

    def __init__(self, config: RunConfig, cluster: Cluster, batch_of=packed_batch, zero: dict[int, dict] | None = None):
        self.config, self.cluster, self.batch_of = config, cluster, batch_of
        self.files = dict(ZERO_FILES)
        own = load_zero(config.zero)
        self.files[own["zero_optimization"]["stage"]] = config.zero
        self.zero = {stage: load_zero(file) for stage, file in self.files.items()} if zero is None else zero
        self.refusals: dict[str, int] = {}  # by `candidates`: why combinations are none, and of how many
        self._stages: dict[tuple, tuple[int, ...]] = {}
        self._batches: dict[int, tuple[MicroBatch, Work, float]] = {}

    def config_of(self, layout: Layout, micro_batch_size: int) -> RunConfig:
        """The run laid out so. Raises ConfigError where the project refuses it."""
        parallel = replace(
            self.config.parallel,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            sequence_parallel=layout.sequence_parallel,
            recompute=layout.recompute,
            reduce_once=layout.reduce_once,
        )
        training = replace(self.config.training, micro_batch_size=micro_batch_size)
        config = replace(self.config, parallel=parallel, training=training, zero=self.files[layout.zero])
        check(config, layout.world_size)
        refuse_untested(config, layout.world_size, layout.zero)
        return config

    def candidates(self) -> Iterator[tuple[Layout, RunConfig]]:
        """Every layout of the cluster that the project accepts. TP within a node alone, with sequence parallelism where it is accepted."""
        self.refusals.clear()
        world, once = self.cluster.world_size, self.config.parallel.reduce_once
        sizes = [(tp, pp) for tp in _divisors(self.cluster.per_node) for pp in _divisors(world // tp)]
        for (tp, pp), zero, recompute, micro in product(sizes, self.zero, RECOMPUTE, MICRO_BATCHES):
            for split in (True, False) if tp > 1 else (False,):
                layout = Layout(tp, pp, world // (tp * pp), zero, split, recompute, once)
                try:
                    yield layout, self.config_of(layout, micro)
                    break
                except ConfigError as error:
                    reason = str(error).splitlines()[0]
                    self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def _work(self, config: RunConfig) -> tuple[MicroBatch, Work, float]:
        """A micro-batch, what it holds and the useful operations of it."""
        micro = config.training.micro_batch_size
        if micro not in self._batches:
            batch = self.batch_of(config)
            self._batches[micro] = batch, work_of(config, batch), step_flops(config, [batch])
        return self._batches[micro]

    def _layers(self, config: RunConfig) -> tuple[int, ...]:
        key = (config.parallel.pipeline_model_parallel_size, config.parallel.recompute)
        if key not in self._stages:
            self._stages[key] = layers_of_stages(config)
        return self._stages[key]

    def _counts(self, world: FakeWorld, config: RunConfig, layers: tuple[int, ...], run: bool) -> tuple[Counted, ...]:
        """Every stage of a layout. run: activations too."""
        batch = self._work(config)[0] if run else None
        return tuple(world.count(config, layers, stage, batch) for stage in range(len(layers)))

    def _memory(self, layout: Layout, config: RunConfig, counted: tuple[Counted, ...]) -> tuple[Memory, ...]:
        training = config.training
        micro_batches = training.global_batch_size // (training.micro_batch_size * layout.dp)
        how = (self.zero[layout.zero], training.precision, layout.dp)
        return tuple(
            memory_of(one, *how, min(layout.pp - stage, micro_batches), micro_batches, layout.reduce_once)
            for stage, one in enumerate(counted)
        )

    def plan(self, world: FakeWorld, layout: Layout, config: RunConfig) -> Plan:
        """Foretell one layout, trials included."""
        return self._plan(layout, config, self._counts(world, config, self._layers(config), run=True))

    def _plan(self, layout: Layout, config: RunConfig, counted: tuple[Counted, ...]) -> Plan:
        hardware, training = self.cluster.hardware, config.training
        layers = self._layers(config)
        _, work, operations = self._work(config)
        micro_batches = training.global_batch_size // training.micro_batch_size
        speed = speed_of(config, self.zero[layout.zero], hardware, self.cluster.per_node, layout.world_size, layers, counted, work)
        mfu = operations * micro_batches / (speed.step_s * layout.world_size * hardware.peak(training.precision))
        memory = self._memory(layout, config, counted)
        return Plan(layout, training.micro_batch_size, config, layers, counted, memory, speed, mfu)

    def search(self, top: int = 10) -> list[Plan]:
        """The best layouts that fit, fastest first. Raises NoLayout."""
        usable = self.cluster.hardware.usable
        found: list[Plan] = []
        least: Plan | None = None  # of those that were tried and do not fit
        with FakeWorld(self.cluster.world_size) as world:
            quick = self._quick(world)
            for plan in quick:
                if plan.peak > usable:
                    continue
                tried = self.plan(world, plan.layout, plan.config)
                if tried.peak <= usable:
                    found.append(tried)
                    if len(found) >= top:
                        break
                elif least is None or tried.peak < least.peak:
                    least = tried
        if not quick:
            raise NoLayout(self._why_none())
        if not found:
            raise NoLayout(self._why_full(least or min(quick, key=lambda plan: plan.peak), tried=least is not None))
        return sorted(found, key=lambda plan: plan.speed.step_s)

    def _quick(self, world: FakeWorld, only=lambda layout, config: True) -> list[Plan]:
        """All candidates by their parameters alone, fastest first: memory is a lower bound, step time as good as with trials."""
        plans = [
            self._plan(layout, config, self._counts(world, config, self._layers(config), run=False))
            for layout, config in self.candidates()
            if only(layout, config)
        ]
        return sorted(plans, key=lambda plan: plan.speed.step_s)

    def _why_none(self) -> str:
        """No combination is accepted at all."""
        world = self.cluster.world_size
        reasons = "; ".join(sorted(self.refusals, key=self.refusals.get)[-2:])
        batch = self.config.training.global_batch_size
        nearest = next((n for n in range(self.cluster.nodes - 1, 0, -1) if Planner(self.config, self._nodes(n))._any()), None)
        other = (
            f"the nearest that has one is --nodes {nearest}"
            if nearest
            else f"no smaller number of nodes has one; global_batch_size is {batch}"
        )
        return f"--nodes: got {self.cluster.nodes} ({world} ranks), for which there is no layout ({reasons}); {other}"

    def _any(self) -> bool:
        return next(self.candidates(), None) is not None

    def _nodes(self, nodes: int) -> Cluster:
        return replace(self.cluster, nodes=nodes)

    def _why_full(self, least: Plan, tried: bool) -> str:
        """Layouts are accepted, but none fits."""
        gib, hardware = 2**30, self.cluster.hardware
        memory = least.memory[least.worst]
        need = f"{least.peak / gib:.1f} GiB a rank ({memory.states / gib:.1f} GiB of it weights, gradients and optimizer between steps)"
        at_least = "" if tried else " at least"
        said = (
            f"--gpu: got {hardware.name} x {self.cluster.world_size}, tensors having {hardware.usable / gib:.1f} GiB of each, wanted"
            f"{at_least} {need} for the smallest layout, {least.layout}, micro-batches of {least.micro_batch_size}"
        )
        return f"{said}; {self._nearest()}"

    def _nearest(self) -> str:
        """What would fit: more nodes, up to 64 times as many."""
        for times in (2, 4, 8, 16, 32, 64):
            cluster = self._nodes(self.cluster.nodes * times)
            planner = Planner(self.config, cluster, self.batch_of)
            smallest = planner.smallest()
            if smallest is not None and smallest.peak <= cluster.hardware.usable:
                return (
                    f"the nearest that fits is --nodes {cluster.nodes}: {smallest.layout}, micro-batches of {smallest.micro_batch_size}, "
                    f"{smallest.peak / 2**30:.1f} GiB a rank"
                )
        return "up to 64 times as many nodes do not help: use a GPU with more memory or a smaller training.seq_length"

    def smallest(self, tries: int = 3) -> Plan | None:
        """Of the layouts the one that needs least memory: the few with the smallest lower bounds are tried."""

        def saving(layout: Layout, config: RunConfig) -> bool:
            return layout.recompute == "full" and config.training.micro_batch_size == MICRO_BATCHES[0]

        with FakeWorld(self.cluster.world_size) as world:
            quick = sorted(self._quick(world, saving), key=lambda plan: plan.peak)
            tried = [self.plan(world, plan.layout, plan.config) for plan in quick[:tries]]
        return min(tried, key=lambda plan: plan.peak, default=None)


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]

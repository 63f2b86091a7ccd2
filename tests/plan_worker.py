"""What the planner does in the tests, in a process of its own: it makes a fake process group, which no other may stand beside."""

import contextlib
import io
import runpy
import sys
import time
from dataclasses import replace

from htc_megatron.benchmarks.scale import zero_of
from htc_megatron.benchmarks.workload import random_batch
from htc_megatron.config import RunConfig
from htc_megatron.model.stages import layers_of_stages
from htc_megatron.parallel.support import Layout
from htc_megatron.planner.hardware import hardware
from htc_megatron.planner.search import Cluster, Planner
from htc_megatron.planner.trial import FakeWorld, parameters_of


def parameters(config: RunConfig) -> float:
    """Of the whole model, counted on two and three of its layers."""
    with FakeWorld(1) as world:
        counted = world.count(config, (config.model.backbone.num_layers,), 0, None)
    return counted.trained + counted.frozen


def few_and_all(config: RunConfig, world_size: int) -> list[tuple]:
    """Each stage counted on a few of its layers, and on all of them; activations too."""
    layers, found = layers_of_stages(config), []
    with FakeWorld(world_size) as world:
        for stage in range(len(layers)):
            batch = random_batch(config, 0, stage == 0)
            found.append((world.count(config, layers, stage, batch), world._counted(config, list(layers), stage, batch)))
    return found


def summed(config: RunConfig, world_size: int, tp: int) -> float:
    """Parameters of all stages of one TP rank, each built whole."""
    layers = layers_of_stages(config)
    explicit = replace(config, parallel=replace(config.parallel, layers_per_stage=layers))
    with FakeWorld(world_size) as world:
        counts = [parameters_of(world.build(explicit, stage)) for stage in range(len(layers))]
    return sum(one.trained + one.frozen for one in counts)


def foretold(config: RunConfig, layout: Layout) -> list[float]:
    """MiB a rank of each stage, under the DeepSpeed JSON that benchmarks/scale.py measures with."""
    planner = Planner(
        config,
        Cluster(1, layout.world_size, hardware("h100-80g")),
        lambda one: random_batch(one, 0, True),
        {layout.zero: zero_of(layout, 0)},
    )
    with FakeWorld(layout.world_size) as world:
        return [memory.peak / 2**20 for memory in planner.plan(world, layout, config).memory]


def tool(*arguments: str) -> tuple[int, str, float]:
    """tools/plan.py in this process: its exit status, what it printed and the seconds of processor that it took."""
    sys.argv = ["plan.py", *arguments]
    printed, began, status = io.StringIO(), time.process_time(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_path("tools/plan.py", run_name="__main__")
        except SystemExit as end:
            status = end.code
    return status, printed.getvalue(), time.process_time() - began

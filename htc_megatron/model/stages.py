"""How many of the backbone's layers each pipeline stage has: `parallel.layers_per_stage`.

Balanced stages are computed from operations, so that the slowest stage is as fast as it can be: the first also runs the
tower, the projectors and the anchors, the last one the output layer, and of the last layer only what is read. The work is
assumed, not measured: samples of one image and SAMPLE_TEXT text tokens, SAMPLE_SUPERVISED of them supervised. So the
answer depends on model, frozen parts, recomputation and number of stages alone, neither on data nor on batch sizes nor on
the machine: a resumed run has the stages it had. Checkpoints depend on no layout, so any run goes on from any.
"""

from typing import NamedTuple

from htc_megatron.config import RunConfig
from htc_megatron.model.layout import ImageShape
from htc_megatron.model.mask import MaskRule
from htc_megatron.model.operations import (
    adapter_operations,
    backward_factors,
    frontend_operations,
    layers_operations,
    output_operations,
    sample_pairs,
)
from htc_megatron.parallel.bubble import idle_shares

SAMPLE_TEXT, SAMPLE_SUPERVISED, SAMPLE_PREFIX = 128, 64, 32  # prefix: the text tokens before the image


class Cost(NamedTuple):
    """Operations of a forward and of a backward pass over the assumed sample."""

    forward: float
    backward: float

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        return Cost(self.forward + times * other.forward, self.backward + times * other.backward)

    @property
    def total(self) -> float:
        return self.forward + self.backward


class Work(NamedTuple):
    """What a micro-batch holds. pairs: of queries and keys, of text rows and of images' rows; read: whether the last layer needs V_hy."""

    tokens: float
    visual: float
    supervised: float
    pairs: tuple[float, float]
    read: bool
    images: float


class Costs(NamedTuple):
    """layer: any but the last of the whole backbone. first, last: what those stages run beside their layers."""

    layer: Cost
    last_layer: Cost
    first: Cost
    last: Cost


def assumed_sample(config: RunConfig) -> Work:
    """The sample that balanced stages are computed for."""
    image, rule = ImageShape.from_config(config.model), MaskRule.from_config(config.model.method)
    tokens = SAMPLE_TEXT + image.length
    pairs = sample_pairs(tokens, [SAMPLE_PREFIX], image, rule)
    return Work(tokens, image.num_visual, SAMPLE_SUPERVISED, pairs, rule.mask == "none", 1)


def part_costs(config: RunConfig, work: Work | None = None) -> Costs:
    """What the parts of a pipeline cost for some work (default: the assumed sample), recomputation included."""
    work = assumed_sample(config) if work is None else work
    model, training = config.model, config.training
    bb, rule = model.backbone, MaskRule.from_config(model.method)
    factors = backward_factors(model, training.freeze)
    full = config.parallel.recompute == "full"
    adapters = adapter_operations(model, work.tokens) / bb.num_layers

    def cost(operations: float, part: str, again: bool = False) -> Cost:
        backward = factors[part] * operations
        return Cost(operations, backward + operations * (again and backward > 0))

    any_layer, before_last, last = layers_operations(bb, rule, *work[:-1])
    # what the layer before the last spares is taken off the last one, on whose stage it mostly is
    spared = any_layer - before_last if bb.num_layers > 1 else 0.0
    layer, last_layer = cost(any_layer, "backbone", full), cost(last - spared, "backbone", full)
    first = Cost(0.0, 0.0)
    for part, operations in frontend_operations(model, work.images).items():
        if part == "vision" and config.data.feature_cache:
            continue  # run once an image, and read from then on
        first = first.plus(cost(operations, part, full and part == "vision"))
    return Costs(
        layer=layer.plus(cost(adapters, "adapters", full)),
        last_layer=last_layer.plus(cost(adapters * work.supervised / work.tokens, "adapters", full)),
        first=first,
        last=cost(output_operations(bb, work.supervised), "backbone"),
    )


def stage_costs(costs: Costs, layers: tuple[int, ...]) -> list[Cost]:
    """What each stage costs with so many layers; at least one on the last."""
    found = [Cost(0.0, 0.0).plus(costs.layer, count - (stage == len(layers) - 1)) for stage, count in enumerate(layers)]
    found[0] = found[0].plus(costs.first)
    found[-1] = found[-1].plus(costs.last_layer).plus(costs.last)
    return found


def balanced(costs: Costs, num_layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, at least one, such that the most expensive stage is as cheap as it can be.

    Every layer beyond a stage's first costs the same wherever it stands, so giving each to the stage that is cheapest with
    it is optimal. Among equals a later stage gets it: it holds fewer micro-batches' activations.
    """
    layers = [1] * stages
    for _ in range(num_layers - stages):
        loads = [cost.total for cost in stage_costs(costs, tuple(layers))]
        cheapest = min(range(stages), key=lambda stage: (loads[stage], -stage))
        layers[cheapest] += 1
    return tuple(layers)


def layers_of_stages(config: RunConfig) -> tuple[int, ...]:
    """Layers of each pipeline stage, in order, of a configuration that `check` accepts."""
    wanted, num_layers = config.parallel.layers_per_stage, config.model.backbone.num_layers
    stages = config.parallel.pipeline_model_parallel_size
    if wanted == "balanced":
        return balanced(part_costs(config), num_layers, stages)
    if wanted == "even":
        return (num_layers // stages,) * stages
    return wanted


def describe_stages(config: RunConfig, micro_batches: int) -> str:
    """A sentence on the stages: their layers, their shares of the cost and the bubble that 1F1B makes of it."""
    layers = layers_of_stages(config)
    costs = stage_costs(part_costs(config), layers)
    loads = [cost.total for cost in costs]
    idle = idle_shares(costs, micro_batches)
    slowest = loads.index(max(loads))
    return (
        f"pipeline: layers {' | '.join(map(str, layers))}, computed cost {' | '.join(f'{load / sum(loads):.1%}' for load in loads)}; "
        f"1F1B with {micro_batches} micro-batches a step leaves stages idle for {sum(idle) / len(idle):.1%} of the passes, "
        f"the slowest, stage {slowest}, for {idle[slowest]:.1%}"
    )

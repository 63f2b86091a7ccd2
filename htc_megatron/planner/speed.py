"""Seconds of a step: operations over the share of the peak that products reach, messages over their links, and 1F1B's bubble.

Assumed, and no more than that: collectives of tensor parallelism and messages between stages hide behind nothing; ZeRO-3's
gathers run beside the passes they are made for and cost what they take longer than those; reductions of gradients hide behind
nothing unless `overlap_comm` is on, and then as gathers do. On CPU nothing hides: what exchanges is what computes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from htc_megatron.config import RunConfig
from htc_megatron.model.layout import MicroBatch
from htc_megatron.model.mask import MaskRule
from htc_megatron.model.rows import capacity
from htc_megatron.model.stages import Cost, Work, part_costs, stage_costs
from htc_megatron.parallel.bubble import idle_shares
from htc_megatron.parallel.gather import GatherOptions, passes_of_1f1b
from htc_megatron.planner.hardware import Hardware
from htc_megatron.planner.trial import Counted
from htc_megatron.training.flops import attention_pairs, last_layer_reads_images

FP32 = 4
STATES_MOVED = 7 * FP32  # bytes the optimiser reads and writes for an element: gradient, weight and two moments


def least_gathered(forward: float, backward: float, frozen: float, limit: float, passes: Sequence[str]) -> float:
    """The fewest elements that have to be gathered in a step, frozen ones being whole from the step before as far as they fit.

    Each pass uses all of its parameters, and at most `limit` of them can be whole when it begins.

    forward, backward: elements that a forward, and a backward, of the stage uses; frozen: those that no optimiser changes.
    """
    uses = {"forward": forward, "backward": backward}
    return max(0, uses[passes[0]] - min(limit, frozen)) + sum(max(0, uses[one] - limit) for one in passes[1:])


@dataclass(frozen=True)
class Links:
    """How fast the groups of a layout exchange. Ranks lie as megatron-core lays them: TP next to each other, then DP, then PP."""

    hardware: Hardware
    per_node: int
    tp: int
    dp: int

    def _group(self, first: int, count: int) -> tuple[float, float]:
        """(bytes/s of a rank, seconds of latency) of a ring of `count` ranks, each `first` ranks from the one before."""
        here = max(1, min(count, self.per_node // max(first, 1)))  # of its ranks on one node
        if here >= count:
            return self.hardware.node_link, self.hardware.node_latency
        return min(self.hardware.node_link, self.hardware.network * here), self.hardware.network_latency  # each has an adapter of its own

    @property
    def tensor(self) -> tuple[float, float]:
        return self._group(1, self.tp)

    @property
    def data(self) -> tuple[float, float]:
        return self._group(self.tp, self.dp)

    @property
    def stages(self) -> tuple[float, float]:
        return self._group(self.tp * self.dp, 2)


def _ring(size: float, count: int, link: tuple[float, float], rounds: int = 1) -> float:
    """Seconds of an all-gather or a reduce-scatter of `size` bytes (rounds 2: an all-reduce) over `count` ranks."""
    return 0.0 if count == 1 else rounds * (size * (count - 1) / count / link[0] + link[1])


def work_of(config: RunConfig, batch: MicroBatch) -> Work:
    """What a micro-batch holds."""
    rule, layout = MaskRule.from_config(config.model.method), batch.layout
    tokens = int((layout.samples[:, 2] - layout.samples[:, 1]).sum())
    visual = layout.num_images * layout.image.num_visual
    pairs, read = attention_pairs(batch, rule), last_layer_reads_images(batch, rule)
    return Work(tokens, visual, batch.num_supervised, pairs, read, layout.num_images)


@dataclass(frozen=True)
class Speed:
    """step_s: of a step. idle: shares of its passes in which each stage waits. exchange_s: exchanges of the slowest stage."""

    step_s: float
    idle: tuple[float, ...]
    exchange_s: float


def speed_of(
    config: RunConfig,
    zero: dict,
    hardware: Hardware,
    per_node: int,
    world_size: int,
    layers: Sequence[int],
    stages: Sequence[Counted],
    work: Work,
) -> Speed:
    """Of a layout whose stages were counted. work: of a micro-batch."""
    parallel, training, backbone = config.parallel, config.training, config.model.backbone
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = world_size // (tp * pp)
    micro_batches = training.global_batch_size // (training.micro_batch_size * dp)
    size = 2 if training.precision == "bf16" else FP32
    links = Links(hardware, per_node, tp, dp)
    rate = hardware.peak(training.precision) * hardware.achievable * tp
    operations = stage_costs(part_costs(config, work), tuple(layers))
    shares = tp if parallel.sequence_parallel else 1
    message = size * backbone.hidden_size * capacity(training.micro_batch_size, training.seq_length, shares)
    again = parallel.recompute == "full"
    costs, exchanged, passes_s = [], [], []
    for stage, (ops, count) in enumerate(zip(operations, layers, strict=True)):
        # Two reductions a layer each way. With sequence parallelism each is a gather and a scatter, and for the gradients of weights
        # a backward gathers once more what the products read (megatron-core keeps the parts alone).
        a_round = 2 * count * _ring(size * work.tokens * backbone.hidden_size, tp, links.tensor)
        both_ways = 1 + hardware.scatter_rounds if parallel.sequence_parallel else 2
        gathered_again = parallel.sequence_parallel and "backbone" not in training.freeze
        reduced, reduced_back = both_ways * a_round, (both_ways + gathered_again) * a_round
        sent = message / shares / links.stages[0] + links.stages[1]
        ways = [(stage > 0) * sent, (stage < pp - 1) * sent] if pp > 1 else [0.0, 0.0]
        rows = work.tokens * count
        wide = 8 * backbone.hidden_size + 5 * backbone.ffn_hidden_size / tp  # norms, SwiGLU, sums: entries read and written a row
        touched = rows * wide * size / hardware.memory_bandwidth
        redone = touched / 2 if parallel.recompute == "selective" else touched if again else 0.0
        forward = ops.forward / rate + reduced + ways[0] + touched
        backward = ops.backward / rate + reduced_back + (reduced if again else 0.0) + ways[1] + 2 * touched + redone
        costs.append(Cost(forward, backward))
        exchanged.append(micro_batches * (reduced * (2 if again else 1) + reduced_back + sum(ways)))
        passes_s.append(micro_batches * (forward + backward))
    idle = idle_shares(costs, micro_batches)
    whole = max(total / (1 - share) for total, share in zip(passes_s, idle, strict=True) if share < 1)
    once, hides = parallel.reduce_once, hardware.hides
    beside = [  # ZeRO's collectives, and the optimiser
        _zero_seconds(counted, zero, size, dp, micro_batches, stage, pp, links, once, passes_s[stage] if hides else 0.0)
        + counted.trained / dp * STATES_MOVED / hardware.memory_bandwidth
        for stage, counted in enumerate(stages)
    ]
    slowest = max(range(pp), key=lambda stage: beside[stage])
    step_s = whole + beside[slowest]
    if hardware.cores is not None:  # ranks take turns where there are more: one computes while another waits
        step_s = max(step_s, (sum(passes_s) + sum(beside)) * tp * dp / hardware.cores)
    return Speed(step_s, tuple(idle), exchanged[slowest] + beside[slowest])


def _zero_seconds(
    counted: Counted, zero: dict, size: int, dp: int, micro_batches: int, stage: int, pp: int, links: Links, once: bool, passes_s: float
) -> float:
    """What ZeRO's collectives add to a step of a stage."""
    options = zero["zero_optimization"]
    link = links.data
    trained = counted.trained
    if options["stage"] == 3:
        gather = GatherOptions.from_zero(zero)
        everything = trained + counted.frozen
        limit = max(gather.limit, counted.unit)
        elements = least_gathered(everything, trained, counted.frozen, limit, passes_of_1f1b(micro_batches, stage, pp))
        pieces = max(1, math.ceil(elements / max(counted.unit, gather.ahead, 1)))
        gathered = _ring(elements * size, dp, link) + (pieces * link[1] if dp > 1 else 0)
        reduced = _ring(FP32 * trained, dp, link) * (1 if once else micro_batches)
        hidden = gathered + (reduced if options.get("overlap_comm") else 0)
        return max(0.0, hidden - passes_s) + (0 if options.get("overlap_comm") else reduced)
    # DeepSpeed reduces buckets to all and keeps its part; new weights are gathered after the step
    times = 1 if once or options["stage"] == 1 else micro_batches
    reduced = _ring(FP32 * trained, dp, link, 2) * times
    if options.get("overlap_comm"):
        reduced = max(0.0, reduced - passes_s)
    return reduced + _ring(size * trained, dp, link)

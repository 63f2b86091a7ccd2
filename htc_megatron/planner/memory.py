"""Bytes a rank holds at most in a step: what trial.py counted, sharded and doubled as DeepSpeed 0.19.8 does it.

Read from its stage_1_and_2.py, stage3.py and bf16_optimizer.py under parallel/zero.py's settings (gradients summed in fp32,
no offloading), and from parallel/gather.py. A step has three moments that can be the largest: the passes, the last
reduction, and the optimiser's step.
"""

from dataclasses import dataclass

from htc_megatron.parallel.gather import GatherOptions
from htc_megatron.planner.trial import Counted

FP32 = 4
ALLREDUCED_AT_ONCE = 500_000_000  # elements: BF16_Optimizer's reduction copies all of a step's gradients together up to here
CONSTANT = 10 * 2**20  # bytes of an engine beside its tensors (hooks, maps, views: counted on CPU)


@dataclass(frozen=True)
class Memory:
    """Bytes. states: between steps. passes, reduction, step: at most beside them in each moment."""

    states: float
    passes: float
    reduction: float
    step: float

    @property
    def peak(self) -> float:
        return self.states + max(self.passes, self.reduction, self.step)


def memory_of(
    counted: Counted, zero: dict, precision: str, dp: int, in_flight: int, micro_batches: int, reduce_once: bool = False
) -> Memory:
    """Of one rank of a stage.

    zero: the DeepSpeed JSON as `load_zero` gave it. in_flight: micro-batches between their passes at most on this stage, under 1F1B.
    """
    options = zero["zero_optimization"]
    stage, bucket = options["stage"], options.get("reduce_bucket_size", 5e8) * (2 if options.get("overlap_comm") else 1)
    size = 2 if precision == "bf16" else FP32
    share = counted.trained / dp
    activations = (in_flight - 1) * counted.kept + max(counted.forward, counted.backward)
    weights = (counted.trained + counted.frozen) * size
    optimizer = share * 3 * FP32  # master copy (DeepSpeed makes one of fp32 weights too) and two moments
    several = micro_batches > 1
    if stage == 3:
        return _zero3(counted, zero, size, dp, activations, bucket, reduce_once and several)
    if stage == 1 and precision == "bf16":  # BF16_Optimizer: whole fp32 gradients throughout, bf16 ones as they come, all reduced at once
        whole, low = counted.trained * FP32, counted.trained * size
        copied = whole if counted.decayed <= ALLREDUCED_AT_ONCE else 0
        return Memory(CONSTANT + weights + optimizer + whole, activations + low, low + copied, 0)
    states = CONSTANT + weights + optimizer
    if stage == 1:  # whole gradients, reduced once a step into this rank's partition
        whole = counted.trained * size
        buffer = bucket * FP32
        return Memory(states, activations + whole, whole + share * FP32 + buffer, 2 * share * FP32)
    buffer = bucket * size
    largest = max(min(bucket, counted.trained), counted.largest) * FP32  # slices are put together once more to be reduced
    if precision == "bf16":
        return Memory(states, activations + share * FP32 + buffer, share * FP32 + buffer + largest, share * FP32)
    owned = min(share + counted.largest, counted.trained) * FP32  # a parameter that crosses into the partition is there whole
    sums = owned * (2 if several else 1)
    whole = counted.trained * size if reduce_once and several else 0
    reduction = sums + buffer + largest + whole
    return Memory(states, activations + sums + buffer + whole, reduction, 2 * share * FP32)


def _zero3(counted: Counted, zero: dict, size: int, dp: int, activations: float, bucket: float, accumulates: bool) -> Memory:
    gather = GatherOptions.from_zero(zero)
    everything = counted.trained + counted.frozen
    room = min(max(gather.limit, counted.unit), everything)
    frozen = min(counted.frozen, room) * size  # whole between steps too
    share = counted.trained / dp
    # masters, moments and fp32 gradients are held throughout, and the bucket for gradients
    states = CONSTANT + everything / dp * size + share * 4 * FP32 + bucket * FP32 + frozen
    ahead = min(max(counted.unit, gather.ahead), room) * size if dp > 1 else 0  # pieces arrive beside the wholes they are put together to
    whole = room * size - frozen
    reduced = max(min(bucket, counted.trained), counted.largest) * (FP32 + (FP32 if size != FP32 else 0))
    sums = counted.trained * size if accumulates else 0
    return Memory(states, activations + whole + ahead + sums, whole + sums + reduced, share * FP32)

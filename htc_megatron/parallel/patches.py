"""Every change to the insides of torch, megatron-core and DeepSpeed, in one place.

Read from megatron-core 0.16.1 and DeepSpeed 0.19.8. Another version is refused until this file has been read against it:
what is mended here otherwise fails silently, in the gradients.
"""

import functools
import types
from collections.abc import Callable
from importlib.metadata import version

import torch
import torch.distributed as dist

READ_FROM = {"megatron-core": "0.16.1", "deepspeed": "0.19.8"}


def check_versions() -> None:
    """Refuse versions whose insides this file was not read from."""
    for package, wanted in READ_FROM.items():
        found = version(package)
        if found != wanted:
            raise RuntimeError(f"{package} {found} is installed, but its insides are patched as of {wanted}: install {package}=={wanted}")


def _must_have(owner: object, *names: str) -> None:
    for name in names:
        if not hasattr(owner, name):
            raise RuntimeError(
                f"{getattr(owner, '__name__', type(owner).__name__)} has no {name!r} any more: read patches.py against this version"
            )


def megatron_on_cpu() -> None:
    """Let megatron-core 0.16.1 run on CPU and gloo. Does nothing where CUDA is there.

    To be called again after DeepSpeed's zero.Init: when that ends, it puts back the factories it found at import.
    """
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *a, **k: None
    torch.cuda.set_device = lambda *a, **k: None
    torch.Tensor.cuda = lambda self, *a, **k: self
    torch.nn.Module.cuda = lambda self, *a, **k: self
    torch.cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)

    def on_cpu(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def build(*args, **kwargs):
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        build.htc_on_cpu = True
        return build

    for name in ("tensor", "zeros", "empty"):  # the schedules and layers ask for device="cuda" by name
        if not hasattr(getattr(torch, name), "htc_on_cpu"):
            setattr(torch, name, on_cpu(getattr(torch, name)))

    import megatron.core.tensor_parallel.random as mcore_random

    _must_have(mcore_random, "_set_cuda_rng_state", "_get_cuda_rng_state")
    mcore_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    mcore_random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()


def deepspeed_without_shm_op() -> None:
    """Keep `init_distributed` from compiling a shared-memory op on CPU: training never uses it, and a killed build leaves
    a lock on which every later run waits for ever."""
    import deepspeed

    _must_have(deepspeed.ops, "__compatible_ops__")
    if "deepspeed_shm_comm" not in deepspeed.ops.__compatible_ops__:
        raise RuntimeError("DeepSpeed no longer lists deepspeed_shm_comm among its ops: read patches.py against this version")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_trace_within(group: dist.ProcessGroup) -> None:
    """Mend 1: ZeRO-3 checks that all ranks fetch the same modules by a broadcast over the world. Pipeline stages have
    different modules, so the check must ask the data-parallel group; otherwise the first forward hangs."""
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator

    _must_have(coordinator, "assert_ints_same_as_other_ranks")

    def same_in_group(ints: list[int]) -> None:
        mine = list(ints)
        theirs: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(theirs, mine, group=group)
        if any(other != mine for other in theirs):
            raise RuntimeError(f"data-parallel ranks run different modules under ZeRO-3: {theirs}")

    coordinator.assert_ints_same_as_other_ranks = same_in_group


def clear_seen_flag(engine) -> None:
    """Mend 2: the engine forgets the last backward only in forward. In 1F1B's cool-down two backwards run in a row, and the
    second would be taken for a part of the first: a KeyError with ZeRO-1 and 2, a wrong gradient with ZeRO-3."""
    _must_have(engine.optimizer, "clear_backward_seen_flag")
    engine.optimizer.clear_backward_seen_flag()


def before_backward(engine, prepare: Callable[[], None]) -> None:
    """Have `prepare` called before each backward of the engine, ahead of DeepSpeed's own preparations."""
    _must_have(engine, "_backward_prologue")
    prologue = type(engine)._backward_prologue

    def prepared(self):
        prepare()
        return prologue(self)

    engine._backward_prologue = types.MethodType(prepared, engine)


def count_norm_by_tp_rank(engine, tp_rank: int) -> None:
    """Mend 4: DeepSpeed has one "model parallel rank" for naming files (distinct over TP x PP) and for counting replicated
    parameters in the gradient norm (once a stage, so the TP rank). The norm reads it from the optimizer."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if isinstance(engine.optimizer, BF16_Optimizer):  # ZeRO-1 in bf16: asks the mpu for its tensor-parallel rank, as it should
        return
    _must_have(engine.optimizer, "model_parallel_rank")
    engine.optimizer.model_parallel_rank = tp_rank

"""Every change to the insides of torch, megatron-core and DeepSpeed, in one place.

Read from megatron-core 0.16.1 and DeepSpeed 0.19.8. Another version is refused until this file has been read against it:
what is mended here otherwise fails silently, in the gradients.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch

from htc_megatron.parallel import progress

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


COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all_single", "barrier", "batch_isend_irecv",
    "broadcast", "broadcast_object_list", "gather_object", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "send",
)  # fmt: skip


def name_collectives() -> None:
    """Have every collective that is begun through torch.distributed noted by parallel/progress.py. Once a process."""
    dist = torch.distributed
    _must_have(dist, *COLLECTIVES)
    for name in COLLECTIVES:
        original = getattr(dist, name)
        if hasattr(original, "htc_named"):
            continue

        @functools.wraps(original)
        def named(*args, _original=original, _name=name, **kwargs):
            with progress.collective(_name):
                return _original(*args, **kwargs)

        named.htc_named = True
        setattr(dist, name, named)


def without_trace(engine) -> None:
    """Mend 1: ZeRO-3 records the order of modules and compares it between all ranks at each forward, by a broadcast over the world.
    Pipeline stages have different modules, so the first forward would hang. parallel/gather.py keeps an order for each pass
    and compares it within a stage; DeepSpeed, without a trace, gathers what it finds cut up and nothing ahead."""
    coordinator = _coordinator(engine.optimizer)
    _must_have(coordinator, "reset_step", "is_complete_trace", "is_record_trace")
    if coordinator.is_complete_trace() or coordinator.is_record_trace():
        raise RuntimeError("DeepSpeed has begun a trace before the first forward: read patches.py against this version")
    coordinator.reset_step = lambda: None


def _coordinator(optimizer):
    _must_have(optimizer, "parameter_offload")
    _must_have(optimizer.parameter_offload, "get_param_coordinator")
    return optimizer.parameter_offload.get_param_coordinator()


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


def release(engine) -> None:
    """Let go of the model of an engine that is destroyed: DeepSpeed's ZeRO-3 keeps every model it was ever given in a list, and with it
    the engine, its buffers and its process groups, whose threads on gloo go on waking a hundred times a second each."""
    from deepspeed.runtime.zero import parameter_offload

    _must_have(parameter_offload, "FWD_MODULE_STACK")
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]


def count_norm_by_tp_rank(engine, tp_rank: int) -> None:
    """Mend 4: DeepSpeed has one "model parallel rank" for naming files (distinct over TP x PP) and for counting replicated
    parameters in the gradient norm (once a stage, so the TP rank). The norm reads it from the optimizer."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if isinstance(engine.optimizer, BF16_Optimizer):  # ZeRO-1 in bf16: asks the mpu for its tensor-parallel rank, as it should
        return
    _must_have(engine.optimizer, "model_parallel_rank")
    engine.optimizer.model_parallel_rank = tp_rank


PIECE = 2**10  # entries whose squares are added up in fp32: a norm right to 1e-7, where torch on CPU is off by 2e-3 over 2**25


def norm_by_pieces(engine) -> None:
    """Have DeepSpeed take the norms of pieces of gradients for the gradients, whose norm is the same: it copies each gradient to fp64
    before its norm, which takes twice the memory of the largest one and, on two CPU cores, 112 ms instead of 7 for 33M entries."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if isinstance(engine.optimizer, BF16_Optimizer):  # ZeRO-1 in bf16: copies nothing
        return
    _must_have(engine.optimizer, "get_grad_norm_direct")
    norm = engine.optimizer.get_grad_norm_direct

    def norm_of_pieces(gradients, params, norm_type=2):
        if norm_type != 2:
            raise RuntimeError(f"DeepSpeed asks for norm {norm_type}, wanted 2: read patches.py against this version")
        return norm([piece_norms(gradient) for gradient in gradients], params)

    engine.optimizer.get_grad_norm_direct = norm_of_pieces


def piece_norms(gradient: torch.Tensor) -> torch.Tensor:
    """Norms of a gradient's pieces, fp32; of the padding behind a partition's last gradient, which has none, the padding itself."""
    if getattr(gradient, "_zero_padding", False):  # DeepSpeed's mark of it
        return gradient
    flat = gradient.detach().reshape(-1).float()
    whole = flat.numel() // PIECE * PIECE
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, PIECE), dim=1)
    return torch.cat([norms, torch.linalg.vector_norm(flat[whole:])[None]])


# ZeRO-3's parameters, as parallel/gather.py handles them. DeepSpeed releases a parameter only where ds_active_sub_modules, the
# modules that use it, is empty: one more name in it holds the parameter.

_HOLD = "held by parallel/gather.py"


class Gather:
    """A collective under way that makes parameters whole."""

    def __init__(self, handle):
        self._handle = handle

    def wait(self) -> None:
        """Have the parameters whole."""
        self._handle.wait()


def gather(parameters: list[torch.nn.Parameter]) -> Gather:
    """Begin to make cut parameters whole, in one collective, and hold them."""
    _must_have(parameters[0], "all_gather_coalesced", "ds_active_sub_modules", "ds_status")
    handle = parameters[0].all_gather_coalesced(parameters)
    for parameter in parameters:
        hold(parameter)
    return Gather(handle)


def hold(parameter: torch.nn.Parameter) -> None:
    """Keep DeepSpeed from releasing a whole parameter after its use."""
    parameter.ds_active_sub_modules.add(_HOLD)


def is_held(parameter: torch.nn.Parameter) -> bool:
    return _HOLD in parameter.ds_active_sub_modules


def is_cut(parameter: torch.nn.Parameter) -> bool:
    """Whether this rank holds its share alone; a parameter on its way is not."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE


def cut(parameter: torch.nn.Parameter) -> None:
    """Give up a whole parameter: this rank's share is what stays. Changes made to the whole are lost."""
    parameter.ds_active_sub_modules.clear()
    parameter.partition()


@contextmanager
def frozen_stay_whole(optimizer, check: Callable[[], None]) -> Iterator[None]:
    """Within it, ZeRO-3's step does not cut up all parameters before it begins; `check` is called instead."""
    _must_have(optimizer, "_partition_all_parameters")
    optimizer._partition_all_parameters = check
    try:
        yield
    finally:
        del optimizer._partition_all_parameters


@contextmanager
def judged_step(optimizer, is_bad: Callable[[float], bool]) -> Iterator[None]:
    """Within it, an optimiser's step leaves weights and states as they are, and frees the gradients, where `is_bad` says so of the
    gradients' norm before clipping: the way DeepSpeed itself takes with a norm that is not finite. `is_bad` is called once a step."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    insides = sys.modules[type(optimizer).__module__]
    _must_have(insides, "is_invalid_grad_norm")
    invalid, asked = insides.is_invalid_grad_norm, False

    def judged(norm) -> bool:
        nonlocal asked
        if asked:  # stages 1 and 2 ask again, of what they clip by
            return invalid(norm)
        asked = True
        bad = is_bad(float(norm))
        return invalid(norm) or bad

    by_stage_1_and_2 = isinstance(optimizer, DeepSpeedZeroOptimizer)
    if by_stage_1_and_2:  # in bf16 check_grad_overflow has it look at each gradient before the norm, and at the norm at all
        _must_have(optimizer, "scaled_global_norm", "check_grad_overflow")
        norm_of, checks = optimizer.scaled_global_norm, optimizer.check_grad_overflow

        def norm_then_check(*args, **kwargs):
            norm = norm_of(*args, **kwargs)
            optimizer.check_grad_overflow = True
            return norm

        optimizer.scaled_global_norm, optimizer.check_grad_overflow = norm_then_check, False  # the norm tells as much, of all ranks
    insides.is_invalid_grad_norm = judged
    try:
        yield
    finally:
        insides.is_invalid_grad_norm = invalid
        if by_stage_1_and_2:
            optimizer.check_grad_overflow = checks
            del optimizer.scaled_global_norm

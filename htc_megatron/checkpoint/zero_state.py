"""A DeepSpeed ZeRO engine (stage 1, 2 or 3) as a State: fp32 master weights, AdamW's moments, frozen weights.

This is the only file of the package that touches DeepSpeed, and it was read from DeepSpeed 0.19.8:

stage 1, 2   `DeepSpeedZeroOptimizer`: each param group is one flat buffer, padded at its end, cut into equal ranges;
             parameters straddle the cuts. `single_partition_of_fp32_groups[group]` is this rank's range of the master
             weights, always a copy (also in fp32). `param._hp_mapping` says which range of the parameter this rank has
             and where in its buffer; it is None where it has nothing.
stage 1 in   `BF16_Optimizer` (bf16 with fp32 gradient accumulation): the same with `fp32_groups_flat_partition`.
bf16
stage 3      `DeepSpeedZeroOptimizer_Stage3`: every parameter is cut by itself into equal ranges, the last one padded;
             `fp32_partitioned_groups_flat[sub_group]` holds the ranges of a sub-group. deepspeed.utils' safe_get_local_* and
             safe_set_local_* reach them by parameter. Frozen parameters are cut the same way, in `param.ds_tensor`.
             Parameters below the persistence threshold stay gathered and have to be gathered again after a load.

AdamW's state is made by its first step; before that, moments are zero and a load makes them.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from htc_megatron.checkpoint.errors import CheckpointError
from htc_megatron.checkpoint.shards import MOMENTS, Place, Shard, shard_of
from htc_megatron.model.naming import Entry
from htc_megatron.weights.table import partition

READ_FROM = "0.19.8"
STAND_IN = "idle_"
FLATS = {  # wrapper -> its attribute with this rank's flat fp32 buffers; exact classes, a subclass may keep them elsewhere
    DeepSpeedZeroOptimizer: "single_partition_of_fp32_groups",
    BF16_Optimizer: "fp32_groups_flat_partition",
    DeepSpeedZeroOptimizer_Stage3: "fp32_partitioned_groups_flat",
}


class EngineState:
    """State of an engine. `entries` names every parameter of its module; `place` is this rank's place in the layout.

    Parameters called `idle_...` need no entry: stand-ins that keep a param group non-empty, always zero.

    Raises CheckpointError if a parameter of the module has no entry, has another shape than its row of the weights
    table says, or if the engine keeps its state in a way this file does not know.
    """

    def __init__(self, engine: DeepSpeedEngine, entries: list[Entry], place: Place):
        self.entries, self.place = entries, place
        self.zero = _need(engine, "optimizer")
        self.inner: torch.optim.Optimizer | None = None
        self.flats: list[Tensor] = []
        if type(self.zero) in FLATS:
            self.inner = _need(self.zero, "optimizer")
            self.flats = _need(self.zero, FLATS[type(self.zero)])
            if not isinstance(self.inner, (torch.optim.Adam, DeepSpeedCPUAdam, FusedAdam)):
                raise CheckpointError(f"optimizer {type(self.inner).__name__}: checkpoints know the state of Adam and AdamW only")
            if getattr(self.zero, "round_robin_gradients", False):  # DeepSpeed's own _hp_mapping is wrong then
                raise CheckpointError(
                    "round_robin_gradients reorders the optimizer's buffers behind DeepSpeed's map of them: set it to false"
                )
            if getattr(self.zero, "swap_optimizer", False):
                raise CheckpointError("optimizer state offloaded to NVMe cannot be checkpointed: use device cpu or none")
        elif self.zero is not None and not isinstance(self.zero, DeepSpeedZeRoOffload):
            raise CheckpointError(f"engine with {type(self.zero).__name__}: checkpoints know ZeRO stages 1, 2 and 3")
        self._check_entries(engine.module)

    # What the State protocol asks for ------------------------------------------------------------------------------

    def optimizer_step(self) -> int | None:
        if self.inner is None:
            return None
        steps = {int(state["step"]) if (state := self._state(flat)) else 0 for flat in self.flats}
        if len(steps) != 1:
            raise CheckpointError(f"AdamW's param groups have made different numbers of steps: {sorted(steps)}")
        return steps.pop()

    def shapes(self, optimizer: bool) -> dict[str, tuple[int, ...]]:
        found = {f"model/{entry.name}": entry.weight.shape for entry in self.entries}
        if optimizer:
            trained = [entry for entry in self.entries if _trained(entry.param)]
            found |= {f"optimizer/{moment}/{entry.name}": entry.weight.shape for moment in MOMENTS for entry in trained}
        return found

    def shards(self, optimizer: bool) -> Iterator[Shard]:
        for entry in self.entries:
            if not _trained(entry.param):
                yield from self._frozen(entry)
            elif isinstance(self.zero, DeepSpeedZeroOptimizer_Stage3):
                yield from self._stage3(entry, optimizer)
            else:
                yield from self._stage12(entry, optimizer)

    def begin_load(self, optimizer_step: int | None) -> None:
        if isinstance(self.zero, DeepSpeedZeroOptimizer_Stage3):
            self.zero.checkpoint_event_prologue()  # nothing stays gathered: what was is stale after the load
        elif isinstance(self.zero, DeepSpeedZeRoOffload):
            self.zero.partition_all_parameters()
        if optimizer_step is not None:
            for flat in self.flats:
                self._make_state(flat, optimizer_step)

    @torch.no_grad()
    def finish_load(self) -> None:
        zero = self.zero
        if isinstance(zero, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
            zero.update_lp_params()  # master -> the parameters the module computes with, gathered over the group
        elif isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
            for sub_group in range(len(_need(zero, "fp16_groups"))):
                zero._reassign_or_swap_out_partitioned_parameters(sub_group)  # as at the end of every step
            zero.checkpoint_event_epilogue()  # gathers the persistent parameters again
        elif isinstance(zero, DeepSpeedZeRoOffload) and zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    # Pieces --------------------------------------------------------------------------------------------------------

    def _stage12(self, entry: Entry, optimizer: bool) -> Iterator[Shard]:
        mapping = _need(entry.param, "_hp_mapping", f"{entry.name} is trained but in no param group of the optimizer")
        if mapping is None:
            return
        flat = self.flats[mapping.param_group_index]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        make = partial(shard_of, entry, self.place, start=there.start, numel=there.numel)
        master = flat.detach().narrow(0, here.start, here.numel)
        yield make("model", read=lambda: master, write=master.copy_)
        for moment in MOMENTS if optimizer else ():

            def piece(moment: str = moment) -> Tensor:
                state = self._state(flat)
                whole = state[moment] if state else torch.zeros_like(flat)
                return whole.detach().narrow(0, here.start, here.numel)

            yield make(f"optimizer/{moment}", read=piece, write=lambda value, piece=piece: piece().copy_(value))

    def _stage3(self, entry: Entry, optimizer: bool) -> Iterator[Shard]:
        param = entry.param
        start, numel, whole = _range(param)
        make = partial(shard_of, entry, self.place, start=start, numel=numel)

        def padded(value: Tensor) -> Tensor:
            return torch.nn.functional.pad(value, (0, whole - numel))

        yield make(
            "model",
            read=lambda: safe_get_local_fp32_param(param)[:numel],
            write=lambda value: safe_set_local_fp32_param(param, padded(value)),
        )
        for moment in MOMENTS if optimizer else ():
            yield make(
                f"optimizer/{moment}",
                read=lambda m=moment: safe_get_local_optimizer_state(param, m)[:numel] if self._has_state() else torch.zeros(numel),
                write=lambda value, m=moment: safe_set_local_optimizer_state(param, padded(value), m),
            )

    def _frozen(self, entry: Entry) -> Iterator[Shard]:
        """Frozen weights have no master copy: what the module holds is all there is. Cut up under ZeRO-3, whole otherwise."""
        param = entry.param
        if hasattr(param, "ds_id"):
            start, numel, _ = _range(param)
            if hasattr(param.ds_tensor, "ds_quant_scale"):
                raise CheckpointError(f"{entry.name}: quantized frozen weights (zero_quantized_nontrainable_weights) are not supported")
            flat, stored = param.ds_tensor.detach().view(-1)[:numel], True
        else:
            flat = param.detach().view(-1)
            start, numel, stored = 0, flat.numel(), self.place.dp_rank == 0
        yield shard_of(entry, self.place, "model", start, numel, lambda: flat, flat.copy_, stored)

    # AdamW's state -------------------------------------------------------------------------------------------------

    def _has_state(self) -> bool:
        return all(bool(self._state(flat)) for flat in self.flats)

    def _state(self, flat: Tensor) -> dict[str, Any]:
        """AdamW's state of a flat buffer; empty before the first step."""
        state = self.inner.state.get(flat, {})
        tensors = {key for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape and key != "step"}
        if state and tensors != set(MOMENTS):
            raise CheckpointError(f"optimizer state {sorted(tensors)}: checkpoints know {', '.join(MOMENTS)} only (no amsgrad)")
        return state

    def _make_state(self, flat: Tensor, step: int) -> None:
        """What AdamW's first step would make, or the same with another count if it is there already."""
        state = self._state(flat)
        if not state:
            self.inner.state[flat] = state = {"step": self._counter(flat)}
            state |= {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
        if torch.is_tensor(state["step"]):
            state["step"].fill_(step)
        else:
            state["step"] = step

    def _counter(self, flat: Tensor) -> Tensor | int:
        if not isinstance(self.inner, torch.optim.Adam):
            return 0  # DeepSpeed's own Adams count in an int
        on_device = any(group.get("fused") or group.get("capturable") for group in self.inner.param_groups)
        return torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")

    # Checks --------------------------------------------------------------------------------------------------------

    def _check_entries(self, module: torch.nn.Module) -> None:
        known = [id(entry.param) for entry in self.entries]
        names = {id(param): name for name, param in module.named_parameters()}
        unnamed = [name for key, name in names.items() if key not in set(known) and not name.startswith(STAND_IN)]
        if unnamed:
            raise CheckpointError(f"parameters without a global name would be lost: {', '.join(unnamed)}")
        if len(set(known)) != len(known) or len({entry.name for entry in self.entries}) != len(known):
            raise CheckpointError("two entries of the checkpoint have the same name or the same parameter")
        for entry in self.entries:
            shape = tuple(getattr(entry.param, "ds_shape", entry.param.shape))
            expected = partition(entry.weight, self.place.tp_rank, self.place.tp_size).local_shape
            if shape != tuple(expected):
                raise CheckpointError(f"{entry.name} is {shape} on TP rank {self.place.tp_rank} of {self.place.tp_size}, not {expected}")


def _trained(param: torch.nn.Parameter) -> bool:
    """Whether the optimizer owns it (DeepSpeed leaves out empty parameters)."""
    return param.requires_grad and getattr(param, "ds_numel", param.numel()) > 0


def _range(param: torch.nn.Parameter) -> tuple[int, int, int]:
    """This rank's range of a ZeRO-3 parameter: first element, number of real ones, number with padding."""
    whole = _need(_need(param, "ds_tensor"), "ds_numel")
    group = _need(param, "ds_process_group")
    start = min(torch.distributed.get_rank(group) * whole, param.ds_numel)
    return start, min(whole, param.ds_numel - start), whole


def _need(owner: Any, name: str, why: str = "") -> Any:
    """An attribute of DeepSpeed's. A release that renamed it must be noticed, not guessed around."""
    if not hasattr(owner, name):
        why = why or f"{type(owner).__name__} has no {name}: checkpoints were written for DeepSpeed {READ_FROM}"
        raise CheckpointError(f"{why} (this is DeepSpeed {deepspeed.__version__})")
    return getattr(owner, name)

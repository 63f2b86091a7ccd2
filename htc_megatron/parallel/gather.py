"""Which of a stage's ZeRO-3 parameters are whole, and when they are gathered, under 1F1B.

DeepSpeed gathers module by module, once in each forward and again in each backward of every micro-batch, and gathers ahead by
a trace that 1F1B's order invalidates. Here a stage's parameters are gathered in units, a transformer layer or a module
outside of one. A unit once whole stays so until the room is needed by one that is used sooner: what fits is gathered once a
step, and the rest as rarely as can be (Belady 1966: evict what is used last). 1F1B's order is known, and one pass each way
tells in which order a pass uses the units; so the next units are gathered while one computes, forward and backward, whichever
micro-batch it is. At the end of a phase what the optimiser is about to change is cut up again; frozen parameters stay whole.

One unit computes at a time: autograd runs what was made last first, so a unit's backward is through when that of the unit before
it begins, and only the current unit must not be cut up. Were that wrong, its operations would meet empty tensors and raise.

DeepSpeed's own hooks stay in place. They find the parameters whole and cannot release what is held; what they would have to
gather after all, a module called outside a phase, they gather. (Whom they take to be computing is no guide: two forwards before
a backward, as in 1F1B's warm-up, make them miss the end of the second backward.)
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from htc_megatron.parallel import patches

Pass = Literal["forward", "backward"]


def passes_of_1f1b(micro_batches: int, pp_rank: int, pp_size: int) -> list[Pass]:
    """The passes of a stage in a step, in order: forwards until the last stage is reached, then in turn, then the backwards left."""
    ahead = min(pp_size - pp_rank - 1, micro_batches)
    return ["forward"] * ahead + ["forward", "backward"] * (micro_batches - ahead) + ["backward"] * ahead


@dataclass(frozen=True)
class GatherOptions:
    """Parameters are counted in elements, as in DeepSpeed's JSON.

    limit: of whole parameters at a time (stage3_max_live_parameters); the largest unit is gathered all the same.
    ahead: gathered ahead of their use, in one collective (stage3_prefetch_bucket_size); at least a unit, but none at all with 0.
    small, all_small: parameters of at most `small` elements stay whole throughout a phase, `all_small` elements of them at most
    (stage3_param_persistence_threshold, stage3_model_persistence_threshold).
    """

    limit: int
    ahead: int
    small: int
    all_small: int

    @classmethod
    def from_zero(cls, zero: dict) -> "GatherOptions":
        """From what `load_zero` gave, with DeepSpeed's defaults."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        found = DeepSpeedZeroConfig(**zero["zero_optimization"])
        small = (int(found.param_persistence_threshold), int(found.model_persistence_threshold))
        return cls(int(found.max_live_parameters), int(found.prefetch_bucket_size), *small)


@dataclass(eq=False)
class Unit:
    """Parameters that are gathered at once."""

    name: str
    parameters: list[nn.Parameter]
    pending: patches.Gather | None = None  # the collective under way, shared by all units that are gathered in it
    used: int = 0  # when last, in uses

    @property
    def numel(self) -> int:
        return sum(p.ds_numel for p in self.parameters)

    @property
    def changes(self) -> bool:
        """Whether nothing of it outlives the optimiser's step."""
        return all(p.requires_grad for p in self.parameters)

    @property
    def missing(self) -> list[nn.Parameter]:
        return [p for p in self.parameters if patches.is_cut(p)]

    @property
    def held(self) -> list[nn.Parameter]:
        return [p for p in self.parameters if patches.is_held(p)]


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.ds_numel for p in parameters)


def _least_above(wanted: int, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Some of the parameters with `wanted` elements and few more; all of them where they have no more."""
    chosen: list[nn.Parameter] = []
    by_size = sorted(parameters, key=lambda p: p.ds_numel)
    while wanted > 0 and by_size:
        index = next((i for i, p in enumerate(by_size) if p.ds_numel >= wanted), len(by_size) - 1)
        chosen.append(by_size.pop(index))
        wanted -= chosen[-1].ds_numel
    return chosen


class Gatherer:
    """Gathers and releases the parameters of one stage. Made and used alike by every data-parallel rank of it.

    Args:
        module: the stage, under ZeRO-3, with DeepSpeed's hooks set.
        together: classes of modules that are one unit with all that is in them.
        group: the data-parallel ranks.
    """

    def __init__(self, module: nn.Module, together: tuple[type, ...], options: GatherOptions, group: dist.ProcessGroup):
        self.options, self.group = options, group
        self.kept = Unit("kept", [])  # whole throughout a phase
        self.units: list[Unit] = []
        self._owner: dict[nn.Parameter, Unit] = {}
        users: dict[nn.Module, Unit] = {}
        self._find(module, "", together, users)
        self.limit = max([0, options.limit - self.kept.numel, *(unit.numel for unit in self.units)])  # of units
        self.live = self.most_live = 0  # elements of units that are whole or on their way; the most there have been
        self._order: dict[Pass, list[Unit]] = {}  # uses of a pass in turn; a unit may come more than once
        self._agreed = 0  # how many of these orders the other ranks have been asked about
        self._plan: Sequence[Pass] = ()
        self._next = 0  # place in the plan of the pass after this one
        self._kind: Pass | None = None
        self._place, self._seen = -1, []  # in this pass: of the current use; uses so far
        self._current: Unit | None = None
        self._clock = 0
        self.active = False
        self._hooks = [module.register_forward_pre_hook(lambda *_: self.begin_pass("forward"), prepend=True)]
        for user in module.modules():
            mine = [users[user]] if user in users else []
            mine += [self._owner[p] for _, p in user.ds_external_parameters() if p in self._owner]
            for unit in dict.fromkeys(mine):
                self._watch(user, unit)

    def _find(self, module: nn.Module, name: str, together: tuple[type, ...], users: dict[nn.Module, Unit]) -> None:
        """Share out the parameters. Those of a module around others, whose use spans theirs, are kept."""
        whole = isinstance(module, together)
        around = not whole and any(True for child in module.children() for _ in child.parameters())
        unit = Unit(name, [])
        for p in module.parameters(recurse=whole):
            if p not in self._owner:
                small = p.ds_numel <= self.options.small and self.kept.numel + p.ds_numel <= self.options.all_small
                self._owner[p] = owner = self.kept if small or around else unit
                owner.parameters.append(p)
        if unit.parameters:
            users[module] = unit
            self.units.append(unit)
        for child_name, child in () if whole else module.named_children():
            self._find(child, f"{name}.{child_name}".lstrip("."), together, users)

    def _watch(self, module: nn.Module, unit: Unit) -> None:
        def before_forward(*_) -> None:
            self.use(unit)

        def before_backward(gradient: Tensor) -> None:
            self.use(unit)

        def after_forward(module: nn.Module, _, output) -> None:
            for tensor in output if isinstance(output, (tuple, list)) else (output,):
                if torch.is_tensor(tensor) and tensor.requires_grad and not tensor.is_leaf:
                    tensor.register_hook(before_backward)

        self._hooks += [module.register_forward_pre_hook(before_forward, prepend=True), module.register_forward_hook(after_forward)]

    # A phase: the passes of one step, or of one evaluation -------------------------------------------------------------

    @contextmanager
    def phase(self, plan: Sequence[Pass]) -> Iterator[None]:
        """Within it, parameters are gathered here; after it, no trained parameter is whole. plan: the passes that will come."""
        for unit in self.units:  # a checkpoint that was loaded has cut up what was whole
            unit.pending = None
        self.live = self.most_live = sum(_size(unit.held) for unit in self.units)
        self._plan, self._next, self._kind, self.active = plan, 0, None, True
        self._gather([self.kept])
        self._wait(self.kept)
        try:
            yield
            self._end_pass()
            for unit in (self.kept, *self.units):
                self._wait(unit)
                for p in unit.held:
                    if p.requires_grad:
                        patches.cut(p)
            self._compare_orders()
        finally:
            self.active = False

    def begin_pass(self, kind: Pass) -> None:
        """To be called ahead of each forward and each backward of the stage."""
        if not self.active:
            return
        self._end_pass()
        self._kind, self._place, self._seen, self._current = kind, -1, [], None
        if kind in self._plan[self._next :]:
            self._next = self._plan.index(kind, self._next) + 1

    def _end_pass(self) -> None:
        if self._kind is not None and self._seen:
            self._order.setdefault(self._kind, self._seen)

    def _compare_orders(self) -> None:
        """Ranks that gather in different orders would wait for each other, or mix up what they send."""
        if self._agreed == len(self._order):
            return
        self._agreed = len(self._order)
        mine = {kind: [unit.name for unit in order] for kind, order in self._order.items()}
        theirs: list = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(theirs, mine, group=self.group)
        if any(other != mine for other in theirs):
            raise RuntimeError(f"data-parallel ranks use a stage's parameters in different orders under ZeRO-3: {theirs}")

    # Use, gathering and release ----------------------------------------------------------------------------------------

    def use(self, unit: Unit) -> None:
        """Have a unit whole, and gathers for those after it under way."""
        if not self.active or self._kind is None:
            return
        self._clock += 1
        unit.used = self._clock
        if unit is not self._current:
            self._current = unit
            self._seen.append(unit)
            order = self._order.get(self._kind, [])
            if unit in order[self._place + 1 :]:
                self._place = order.index(unit, self._place + 1)
        if unit is not self.kept:
            self._bring(unit)
            self._gather_ahead()

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Have these parameters whole within a phase, ahead of its passes."""
        for unit in dict.fromkeys(self._owner[p] for p in parameters):
            if unit is not self.kept:
                self._bring(unit)

    def _bring(self, unit: Unit) -> None:
        if unit.missing:
            self._make_room(_size(unit.missing), -1)
            self._gather([unit])
        self._wait(unit)
        for p in unit.parameters:  # DeepSpeed may have gathered some of it by itself
            if not patches.is_held(p):
                patches.hold(p)
                self.live += p.ds_numel

    def _gather_ahead(self) -> None:
        """Start a gather of the units that this pass uses next, as far as there is room.

        The next unit takes the room of any that is used later. Those after it only take room that the current unit's would be
        next in turn for: taken early, any other would have to be gathered once more than needed.
        """
        if not self.options.ahead or any(unit.pending is not None for unit in self.units):
            return
        batch: list[Unit] = []
        size = 0
        for later, unit in enumerate(self._order.get(self._kind, [])[self._place + 1 :], 1):
            needed = 0 if unit in batch else _size(unit.missing)
            if not needed:
                continue
            if batch and size + needed > self.options.ahead:
                break
            if not self._make_room(size + needed, max(later, self._next_use(self._current)) if batch else later, batch):
                break
            batch.append(unit)
            size += needed
        self._gather(batch)

    def _gather(self, units: list[Unit]) -> None:
        missing = [p for unit in units for p in unit.missing]
        if not missing:
            return
        pending = patches.gather(missing)
        for unit in units:
            unit.pending = pending
        if self.kept not in units:
            self.live += _size(missing)
            self.most_live = max(self.most_live, self.live)

    def _wait(self, unit: Unit) -> None:
        pending = unit.pending
        if pending is None:
            return
        pending.wait()
        for other in (self.kept, *self.units):
            if other.pending is pending:
                other.pending = None

    def _make_room(self, numel: int, until: float, wanted: Sequence[Unit] = ()) -> bool:
        """Cut up units that are used last, and later than `until` uses from now; of those used as late, what was used longest ago.

        Returns whether there is room for `numel` elements. A gather that can wait (until >= 0) is given room only if there is enough.
        """
        excess = self.live + numel - self.limit
        if excess <= 0:
            return True
        if until < 0:  # what is on its way is not what is used next after all
            for unit in self.units:
                self._wait(unit)
        others = [unit for unit in self.units if unit is not self._current and unit not in wanted and unit.pending is None]
        free = [(self._next_use(unit), -unit.used, unit) for unit in others if unit.held]
        victims: list[nn.Parameter] = []
        for later, _, unit in sorted(free, key=lambda one: one[:2], reverse=True):
            if excess <= 0 or later <= until:
                break
            victims += (chosen := _least_above(excess, unit.held))
            excess -= _size(chosen)
        if excess > 0 and until >= 0:
            return False
        for p in victims:
            self.live -= p.ds_numel
            patches.cut(p)
        return excess <= 0

    def _next_use(self, unit: Unit) -> float:
        """How many uses from now; infinite where its values will have changed by then, or as long as a pass has not been seen."""
        order = self._order.get(self._kind, [])
        if unit in order[self._place + 1 :]:
            return order.index(unit, self._place + 1) - self._place
        ahead = len(order) - self._place
        for kind in self._plan[self._next :]:
            order = self._order.get(kind, [])
            if unit in order:
                return ahead + order.index(unit)
            ahead += len(order)
        order = self._order.get("forward", [])
        return ahead + order.index(unit) if unit in order and not unit.changes else math.inf

    # Outside of phases -------------------------------------------------------------------------------------------------

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Cut up those of the parameters that are whole: their values are about to be changed."""
        for p in parameters:
            if patches.is_held(p):
                patches.cut(p)

    def check_cut(self) -> None:
        """Raises RuntimeError if a trained parameter is whole: the optimiser's step changes the shares alone."""
        whole = [p.ds_id for p in self._owner if p.requires_grad and not patches.is_cut(p)]
        if whole:
            raise RuntimeError(f"{len(whole)} trained parameters are whole ahead of the optimiser's step, wanted none: ids {whole[:5]}")

    def destroy(self) -> None:
        for hook in self._hooks:
            hook.remove()

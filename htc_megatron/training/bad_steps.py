"""Steps whose loss or gradient norm is not finite, or jumps: left out before the optimiser makes them, and counted."""

import math
from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from htc_megatron.config import FaultsConfig
from htc_megatron.parallel.groups import Groups


class BadSteps:
    """Judges the steps of a run. A bad one leaves weights and optimiser as they were; it counts as a step all the same, so its data
    are passed over and the schedule of learning rates stays in place.

    Attributes: in_a_row: bad steps up to now without a good one between. total: of this start of the run.
    """

    def __init__(self, config: FaultsConfig, groups: Groups):
        self.config, self.groups = config, groups
        self.in_a_row = self.total = 0
        self.losses: deque[float] = deque(maxlen=config.jump_window)
        self.norms: deque[float] = deque(maxlen=config.jump_window)

    @property
    def judges(self) -> bool:
        """Whether a step may be left out. Otherwise one that is not finite ends the run, and nothing else is bad."""
        return self.config.on_bad_loss != "stop" or bool(self.config.max_loss_jump or self.config.max_norm_jump)

    def is_bad(self, loss: float, norm: float) -> bool:
        """Called by every rank with what it has of the step, before the optimiser makes it; the answer is the same on all."""
        mine = not math.isfinite(loss) or not math.isfinite(norm)
        mine = mine or _jumps(loss, self.losses, self.config.max_loss_jump) or _jumps(norm, self.norms, self.config.max_norm_jump)
        anywhere = torch.tensor(mine, dtype=torch.int32, device=self.groups.device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return bool(anywhere)

    def count(self, loss: float, norm: float, applied: bool) -> None:
        """Take in a step that was made (applied) or left out."""
        if applied:
            self.in_a_row = 0
            self.losses.append(loss)
            self.norms.append(norm)
        else:
            self.in_a_row, self.total = self.in_a_row + 1, self.total + 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run judges as the uninterrupted one does."""
        return {"in_a_row": self.in_a_row, "losses": list(self.losses), "norms": list(self.norms)}

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; {}: begin anew."""
        self.in_a_row = state.get("in_a_row", 0)
        for mine, kept in ((self.losses, "losses"), (self.norms, "norms")):
            mine.clear()
            mine.extend(state.get(kept, []))


def _jumps(value: float, before: deque[float], factor: float) -> bool:
    return bool(factor) and len(before) == before.maxlen and value > factor * sum(before) / len(before)

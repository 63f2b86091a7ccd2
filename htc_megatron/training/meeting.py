"""What all ranks must know before they go on: whether any of them is asked to stop, or waits for its data."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from htc_megatron.config import RunConfig
from htc_megatron.parallel.groups import Groups
from htc_megatron.training.life import Interrupt, Lives, NoProgress

T = TypeVar("T")


class Meeting:
    """One small all-reduce over the world, before each step of training and of evaluation.

    Attributes: asked: whether any rank has been asked to stop; once it is so it stays so.
    """

    def __init__(self, groups: Groups, interrupt: Interrupt):
        self.groups, self.interrupt, self.asked = groups, interrupt, False

    def agree(self, waiting: bool = False, broken: bool = False) -> tuple[str, bool, bool]:
        """Why to stop ("" where no rank is asked to), whether any rank is `waiting`, and whether any has `broken` samples. Called by
        every rank."""
        reason = self.interrupt.reason
        flags = torch.tensor([self.asked or bool(reason), waiting, broken], dtype=torch.int32, device=self.groups.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        self.asked, waits, any_broken = map(bool, flags.tolist())
        return (reason or "another rank's signal or limit") if self.asked else "", waits, any_broken

    def until_asked(self, steps: Iterable[T]) -> Iterator[T]:
        """The same steps, up to the moment at which any rank is asked to stop. Iterated by every rank."""
        for step in steps:
            if self.agree()[0]:
                return
            yield step


def begin_life(config: RunConfig, groups: Groups, step: int) -> None:
    """Take down that the run begins at `step`. Called by every rank; raises NoProgress, on all alike, where it has too often: a rank that
    refused alone would leave the others waiting for it."""
    refusal: list[str | None] = [None]
    if groups.rank == 0:
        try:
            Lives(config.output_dir).begin(step, config.life.max_restarts_without_progress)
        except NoProgress as error:
            refusal = [str(error)]
    dist.broadcast_object_list(refusal, src=0, group=groups.checkpoint)
    if refusal[0] is not None:
        raise NoProgress(refusal[0])

"""All ranks succeed or all ranks fail: a rank that raises alone would leave the others waiting in the next collective."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from htc_megatron.checkpoint.errors import CheckpointError, PeerLost

T = TypeVar("T")


class Together:
    """The ranks of `group` (None: the default group; a single process if there is none)."""

    def __init__(self, group: ProcessGroup | None = None):
        self.group = group
        self.alone = group is None and not dist.is_initialized()
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)

    def share(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on rank 0; an empty list elsewhere."""
        if self.alone:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._talking():
            dist.gather_object(value, values, group=self.group, group_dst=0)
        return values or []

    def run(self, work: Callable[[], T]) -> T:
        """Call `work` on every rank. If it raises on any, CheckpointError with the first rank's sentence is raised on all."""
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        sentences = self.share(None if error is None else _sentence(error))
        failed = [rank for rank, sentence in enumerate(sentences) if sentence is not None]
        if not failed:
            return result
        different = sentences[failed[0]] + (f" (and {len(failed) - 1} more of {self.size} ranks failed)" if len(failed) > 1 else "")
        raise CheckpointError(different) from error

    def on_first(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0; every rank gets its result, or CheckpointError."""
        return self.share(self.run(lambda: work() if self.rank == 0 else None))[0]

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """A rank that is no longer there ends the others' collective with an error of the transport's own."""
        try:
            yield
        except RuntimeError as error:
            first, *_ = str(error).splitlines() or [""]
            raise PeerLost(f"rank {self.rank} of {self.size} lost another rank in the middle of a checkpoint: {first}") from error


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"

"""What a rank sends and receives: every collective and message, counted where all callers meet."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps

import torch
import torch.distributed as dist
from torch import Tensor


def _bytes(tensors) -> int:
    """Of all tensors in nested lists."""
    if torch.is_tensor(tensors):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


def _first(*arguments: Tensor) -> int:
    return _bytes(arguments[0])


def _second(*arguments: Tensor) -> int:
    return _bytes(arguments[1])


# Methods of torch's ProcessGroup, which every function of torch.distributed comes down to, whoever took hold of it before:
# the kind, where the payload is (all that is gathered, summed or sent), and the share of it that each of n ranks must send.
_METHODS = {
    "allreduce": ("all-reduce", _first, lambda n: 2 * (n - 1) / n),
    "allreduce_coalesced": ("all-reduce", _first, lambda n: 2 * (n - 1) / n),
    "allgather": ("all-gather", _first, lambda n: (n - 1) / n),
    "all_gather_single": ("all-gather", _first, lambda n: (n - 1) / n),
    "all_gather_single_coalesced": ("all-gather", _first, lambda n: (n - 1) / n),
    "reduce_scatter": ("reduce-scatter", _second, lambda n: (n - 1) / n),
    "reduce_scatter_single": ("reduce-scatter", _second, lambda n: (n - 1) / n),
    "reduce_scatter_single_coalesced": ("reduce-scatter", _second, lambda n: (n - 1) / n),
    "alltoall": ("all-to-all", _second, lambda n: (n - 1) / n),
    "all_to_all_single": ("all-to-all", _second, lambda n: (n - 1) / n),
    # a tree, or a ring in pieces: some rank sends all of it on, and on average each sends (n - 1) / n
    "broadcast": ("broadcast", _first, lambda n: (n - 1) / n),
    "reduce": ("reduce", _first, lambda n: (n - 1) / n),
    "gather": ("gather", _second, lambda n: 1),
    "scatter": ("scatter", _second, lambda n: (n - 1) / n),
    "send": ("send", _first, lambda n: 1),
    "barrier": ("barrier", lambda *_: 0, lambda n: 0),
}


@dataclass
class Count:
    """calls; payload, in bytes; and the bytes that this rank must send for it at the least."""

    calls: int = 0
    payload: int = 0
    sent: float = 0.0

    def add(self, other: "Count") -> None:
        self.calls, self.payload, self.sent = self.calls + other.calls, self.payload + other.payload, self.sent + other.sent


@dataclass
class Traffic:
    """Counts by (kind, ranks of the group). Groups of one rank send nothing and are not counted."""

    counts: dict[tuple[str, tuple[int, ...]], Count] = field(default_factory=dict)

    def of(self, *kinds: str, group: dist.ProcessGroup | None = None) -> Count:
        """The sum over these kinds (none: all) in a group (None: in all)."""
        ranks = None if group is None else tuple(dist.get_process_group_ranks(group))
        found = Count()
        for (kind, members), count in self.counts.items():
            if (not kinds or kind in kinds) and ranks in (None, members):
                found.add(count)
        return found

    def _note(self, kind: str, group: dist.ProcessGroup, payload: int, share: float) -> None:
        key = (kind, tuple(dist.get_process_group_ranks(group)))
        self.counts.setdefault(key, Count()).add(Count(1, payload, payload * share))


@contextmanager
def counted() -> Iterator[Traffic]:
    """Within it, what this process sends over torch's process groups is counted, in backward too. Not to be nested.

    Raises RuntimeError where torch's process groups have other methods than those known here, which would go uncounted.
    """
    traffic, group_class = Traffic(), dist.ProcessGroup
    missing = [name for name in _METHODS if name not in vars(group_class)]
    if missing:
        raise RuntimeError(f"torch {torch.__version__}: ProcessGroup has no {', '.join(missing)}: read counting.py against this version")
    originals = {name: vars(group_class)[name] for name in _METHODS}  # as they stand there, to be put back the same

    def counting(name: str):
        (kind, payload, share), original = _METHODS[name], getattr(group_class, name)

        @wraps(original)
        def method(self, *arguments, **options):
            if self.size() > 1:
                traffic._note(kind, self, payload(*arguments), share(self.size()))
            return original(self, *arguments, **options)

        return method

    try:
        for name in _METHODS:
            setattr(group_class, name, counting(name))
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(group_class, name, original)

"""What one rank has of the model and its optimiser, in words that know neither DeepSpeed nor files.

A `Shard` is a flat piece of one tensor-parallel parameter (or of one of its moments), with how to read and write it. A
`State` hands out all shards of a rank; zero_state.py makes one from a DeepSpeed engine.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from htc_megatron.checkpoint.boxes import Box, shard_boxes
from htc_megatron.model.naming import Entry
from htc_megatron.weights.table import Partition, partition

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch names them


@dataclass(frozen=True)
class Place:
    """Where a rank stands in the layout. Every parameter lives on exactly one pipeline stage."""

    rank: int = 0
    world_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    zero_stage: int = 1
    precision: str = "fp32"

    def layout(self) -> dict[str, Any]:
        """What all ranks of the layout have in common; goes into the manifest."""
        return {key: value for key, value in asdict(self).items() if not key.endswith("rank")}


@dataclass(frozen=True)
class Shard:
    """The flat elements [start, start + numel) of this rank's part of a global tensor.

    key: `model/<name>` or `optimizer/<moment>/<name>`. shape: of the global tensor, as stored.
    read(): those elements, 1-D, any type; may be a view of live memory. write(value): the inverse.
    stored: whether this rank's copy is the one that goes into a checkpoint; other ranks may hold the same elements.
    """

    key: str
    shape: tuple[int, ...]
    part: Partition
    start: int
    numel: int
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]
    stored: bool

    def boxes(self) -> Iterator[tuple[Box, slice]]:
        """Boxes of the global tensor, each with the elements of this shard it holds. Padding rows are in none of them."""
        part = self.part
        for box, at in shard_boxes(self.start, self.start + self.numel, part.view_shape, part.offset, part.size):
            yield box, slice(at - self.start, at - self.start + box.numel)


class State(Protocol):
    """Source of a save and destination of a load."""

    place: Place

    def optimizer_step(self) -> int | None:
        """AdamW's step count; None where there is no optimiser."""

    def shapes(self, optimizer: bool) -> dict[str, tuple[int, ...]]:
        """Stored global shape of every tensor this rank has to do with, by key, whether or not it holds a piece of it."""

    def shards(self, optimizer: bool) -> Iterator[Shard]:
        """Every piece this rank holds."""

    def begin_load(self, optimizer_step: int | None) -> None:
        """Called before the first write; None: the optimiser is not loaded. Collective."""

    def finish_load(self) -> None:
        """Make the module compute with what was written. Collective, and called only if every rank has written all."""


class PlainState:
    """State of ordinary parameters without an optimiser, each rank holding its whole tensor-parallel share.

    For tools and tests; also the reference zero_state.py is compared with.
    """

    def __init__(self, entries: list[Entry], place: Place):
        self.entries, self.place = entries, place

    def optimizer_step(self) -> int | None:
        return None

    def shapes(self, optimizer: bool) -> dict[str, tuple[int, ...]]:
        return {f"model/{entry.name}": entry.weight.shape for entry in self.entries}

    def shards(self, optimizer: bool) -> Iterator[Shard]:
        for entry in self.entries:
            flat = entry.param.detach().view(-1)
            yield shard_of(entry, self.place, "model", 0, flat.numel(), lambda flat=flat: flat, flat.copy_, self.place.dp_rank == 0)

    def begin_load(self, optimizer_step: int | None) -> None:
        pass

    def finish_load(self) -> None:
        pass


def shard_of(
    entry: Entry, place: Place, kind: str, start: int, numel: int, read: Callable[[], Tensor], write: Callable, stored: bool = True
) -> Shard:
    """A Shard of `entry`. kind: `model` or `optimizer/<moment>`. Weights that TP does not cut are stored by TP rank 0 alone."""
    weight = entry.weight
    once = weight.is_cut or place.tp_rank == 0
    part = partition(weight, place.tp_rank, place.tp_size)
    return Shard(f"{kind}/{entry.name}", weight.shape, part, start, numel, read, write, stored and once)

"""Flat ranges of a tensor-parallel shard as boxes of the global tensor.

ZeRO cuts a parameter's memory into flat ranges that know nothing of rows and columns. A flat range of a row-major n-d
tensor is at most 2n - 1 boxes: growing ones up to the first whole row, the whole rows, shrinking ones behind the last.
Boxes of the global tensor are all a checkpoint stores, so no layout can be read from it.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangular part of an n-d tensor: its first element's indices and its extent in every dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)


def flat_boxes(start: int, stop: int, shape: tuple[int, ...]) -> list[Box]:
    """The flat range [start, stop) of a row-major tensor of `shape`, as boxes in flat order (at most 2n - 1 of them).

    Raises ValueError if the range does not lie in the tensor.
    """
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"flat range [{start}, {stop}) does not lie in a tensor of shape {shape}")
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    boxes = []
    while start < stop:
        offset = tuple(start // stride % extent for stride, extent in zip(strides, shape, strict=True))
        size: tuple[int, ...] = ()
        for dim, stride in enumerate(strides):  # the outermost dimension of which a whole slice begins here and fits
            if start % stride == 0 and stop - start >= stride:
                count = min((stop - start) // stride, shape[dim] - offset[dim])
                size = ((1,) * dim) + (count,) + tuple(shape[dim + 1 :])
                break
        box = Box(offset, size)
        boxes.append(box)
        start += box.numel
    return boxes


def shard_boxes(
    start: int, stop: int, view_shape: tuple[int, ...], offset: tuple[int, ...], size: tuple[int, ...]
) -> list[tuple[Box, int]]:
    """A flat range of a tensor-parallel shard as boxes of the global tensor, each with the flat place it begins at.

    view_shape: the shard's memory with the global tensor's dimensions ([2, ffn/tp, H] for a gated pair).
    offset: where the shard's first element stands in the global tensor.
    size: the part of the view that exists globally; less than view_shape in dimension 0 only (padding rows of a
        vocabulary, which no box covers).
    """
    if tuple(size[1:]) != tuple(view_shape[1:]):
        raise ValueError(f"only rows may be padding, but a view of shape {view_shape} has {size} real entries")
    stop = min(stop, math.prod(size))
    found, at = [], start
    for box in flat_boxes(start, stop, view_shape) if start < stop else []:
        found.append((Box(tuple(a + b for a, b in zip(box.offset, offset, strict=True)), box.size), at))
        at += box.numel
    return found


def intersect(a: Box, b: Box) -> Box | None:
    """The part two boxes of one tensor share; None if there is none."""
    low = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    high = tuple(min(x + m, y + n) for x, m, y, n in zip(a.offset, a.size, b.offset, b.size, strict=True))
    if any(stop <= first for first, stop in zip(low, high, strict=True)):
        return None
    return Box(low, tuple(stop - first for first, stop in zip(low, high, strict=True)))

"""Samples packed end to end into rows of seq_length: a pure function of (lengths, seq_length, seed, epoch)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from htc_megatron.config import ConfigError

WINDOW = 64  # rows open at a time; more pack tighter and mix less


@dataclass(frozen=True)
class Packing:
    """rows: sample indices of each packed row, in order. padding_share: places of all rows that hold no token."""

    rows: list[list[int]]
    padding_share: float


def check_lengths(lengths: Sequence[int], seq_length: int, source: str) -> None:
    """Refuse samples that no row can hold. Raises ConfigError."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        raise ConfigError(f"{source}: it holds no sample")
    too_long = int((lengths > seq_length).sum())
    if too_long:
        raise ConfigError(
            f"training.seq_length is {seq_length}, but {too_long} of {len(lengths)} samples of {source} are longer, images included "
            f"(the longest: {int(lengths.max())}): raise it, or prepare the data with --seq-length and --tokens-per-image"
        )


def random_order(count: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """Permutation of range(count). Built on the raw bit stream, which numpy keeps from release to release. [count] int64."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, stream]))
    return np.argsort(bits.random_raw(count), kind="stable")


def pack(lengths: Sequence[int], seq_length: int, seed: int, epoch: int, shuffle: bool = True, window: int = WINDOW) -> Packing:
    """Every sample in exactly one row, none over seq_length.

    Samples are shuffled and put, one by one, into the first of `window` open rows with enough room; where none has, the fullest
    is closed. The closed rows are shuffled again, so that the emptier ones of the end do not gather there. shuffle=False: the
    samples' own order, and rows in the order in which they were opened.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = random_order(len(lengths), seed, epoch) if shuffle else np.arange(len(lengths))
    room = np.zeros(window, dtype=np.int64)  # 0: no row open in this slot, or a full one
    slots: list[list[int]] = [[] for _ in range(window)]
    rows: list[list[int]] = []
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        slot = int(np.argmax(room >= length))
        if room[slot] < length:
            slot = int(np.argmin(room))
            slots[slot], room[slot] = [], seq_length
            rows.append(slots[slot])
        if room[slot] < length:
            raise ValueError(f"sample {sample} has {length} tokens, a row holds {seq_length}")
        slots[slot].append(sample)
        room[slot] -= length
    if shuffle:
        rows = [rows[i] for i in random_order(len(rows), seed, epoch, stream=1).tolist()]
    places = len(rows) * seq_length
    return Packing(rows, 1.0 - float(lengths.sum()) / places if places else 0.0)

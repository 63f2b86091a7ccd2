"""Samples packed end to end into rows of seq_length: a pure function of (lengths, seq_length, seed, epoch)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from htc_megatron.config import ConfigError

WINDOW = 4096  # samples packed together; more pack little tighter (0.7 % padding to 0.4 % on LLaVA's lengths) and take longer
PACKER = "best fit decreasing, 4096"  # names this file's order: to be changed with anything that changes which rows `pack` makes


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

    Samples are shuffled and taken `window` at a time. Within a window they are placed from the longest to the shortest, each into
    the row in which it leaves the least room (best fit decreasing, within 11/9 of the fewest rows possible). All rows are shuffled
    again: short samples fill up long ones' rows, but no stretch of the epoch has them more than another. shuffle=False: windows
    follow each other in the data's own order, rows by their first sample.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = random_order(len(lengths), seed, epoch) if shuffle else np.arange(len(lengths))
    rows: list[list[int]] = []
    for begin in range(0, len(order), window):
        samples = order[begin : begin + window]
        samples = samples[np.argsort(-lengths[samples], kind="stable")]
        packed = _best_fit(samples.tolist(), lengths[samples].tolist(), seq_length)
        rows += packed if shuffle else sorted(sorted(row) for row in packed)
    if shuffle:
        rows = [rows[i] for i in random_order(len(rows), seed, epoch, stream=1).tolist()]
    places = len(rows) * seq_length
    return Packing(rows, 1.0 - float(lengths.sum()) / places if places else 0.0)


def _best_fit(samples: list[int], lengths: list[int], seq_length: int) -> list[list[int]]:
    """Rows in the order in which they were opened. Of rows with equal room the last one put there takes the sample."""
    rows: list[list[int]] = []
    by_room: list[list[list[int]]] = [[] for _ in range(seq_length)]  # rows that have so much room
    rooms = 0  # bit r is set where by_room[r] holds a row: the tightest fit is its lowest bit from the length on
    for sample, length in zip(samples, lengths, strict=True):
        if not 0 < length <= seq_length:
            raise ValueError(f"sample {sample} has {length} tokens, a row holds 1 to {seq_length}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = seq_length, []
            rows.append(row)
        row.append(sample)
        room -= length
        if room:
            by_room[room].append(row)
            rooms |= 1 << room
    return rows

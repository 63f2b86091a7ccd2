"""Write safetensors files tensor by tensor, so that memory is bounded by the largest tensor and not by a file."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
T = TypeVar("T")
INDEX_NAME = "model.safetensors.index.json"


class Entry(NamedTuple):
    """A tensor to come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_files(entries: Sequence[Entry], limit: int) -> dict[str, list[Entry]]:
    """Entries, in order, over files of at most `limit` bytes (more only where one tensor is larger), by file name."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def write_files(folder: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]], limit: int = 5 * 10**9) -> list[str]:
    """Write `tensors`, which come in the order of `entries`, into `folder`, with an index if there are several files.

    Returns the file names. Raises ValueError if a tensor is not the one that was announced.
    """
    files = plan_files(entries, limit)
    with closing(ahead(tensors)) as stream:
        _write_all(folder, files, stream)
        if next(stream, None) is not None:
            raise ValueError(f"{folder}: more tensors came than the {len(entries)} announced")
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": {entry.name: file for file, group in files.items() for entry in group},
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return list(files)


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each one made in a thread while the one before it is used. What making one raises is raised here."""
    end, source = object(), iter(items)
    with ThreadPoolExecutor(1, "ahead") as pool:
        coming = pool.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, source, end)
            yield item


def _write_all(folder: Path, files: dict[str, list[Entry]], stream: Iterator[tuple[str, Tensor]]) -> None:
    for file, group in files.items():
        with open(folder / file, "wb") as target:
            target.write(_header(group))
            for entry in group:
                name, tensor = next(stream, (None, None))
                if tensor is None or (name, tuple(tensor.shape), tensor.dtype) != tuple(entry):
                    seen = "nothing" if tensor is None else f"{name} {tuple(tensor.shape)} {tensor.dtype}"
                    raise ValueError(f"{file}: expected {entry.name} {entry.shape} {entry.dtype}, got {seen}")
                raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                target.write(memoryview(raw.numpy()))


def _header(group: Sequence[Entry]) -> bytes:
    """Length, then JSON padded to a multiple of eight bytes, as the format asks for."""
    content: dict = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in group:
        stop = start + entry.nbytes
        content[entry.name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

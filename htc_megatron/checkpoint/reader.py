"""Read a checkpoint in any process: no process group, no layout, no more of the files than is asked for."""

import math
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from htc_megatron.checkpoint.box_file import DTYPE_NAMES, DTYPES, BlockCache, BoxFile, CheckedReader, StoredBox
from htc_megatron.checkpoint.boxes import Box, intersect
from htc_megatron.checkpoint.errors import CheckpointError
from htc_megatron.checkpoint.folder import resolve
from htc_megatron.checkpoint.manifest import CONFIG, Manifest, StoredTensor, config_from_bytes
from htc_megatron.config import RunConfig
from htc_megatron.parallel import progress
from htc_megatron.weights.table import weights

SUFFIX = ".safetensors"


class CheckpointReader:
    """A complete checkpoint: `folder` itself, or the latest in a folder of checkpoints.

    Opening it checks that every file is there with its length, that no other file is, and that the boxes in the files
    make up every tensor of the manifest. Bytes are compared with their checksums when they are read. Raises
    CheckpointError, which names what is missing, misshapen or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = resolve(folder)
        self.manifest = Manifest.read(self.folder)
        self.manifest.check_files(self.folder)
        cache = BlockCache()
        self.files = {
            name: (BoxFile if name.endswith(SUFFIX) else CheckedReader)(self.folder / name, record, cache)
            for name, record in self.manifest.files.items()
        }
        self.index: dict[str, list[tuple[BoxFile, StoredBox]]] = {key: [] for key in self.manifest.tensors}
        self.bounds: dict[str, tuple[numpy.ndarray, numpy.ndarray]] = {}
        self._index()
        if CONFIG not in self.files:
            raise CheckpointError(f"{self.folder}: {CONFIG} is missing")
        self.config: RunConfig = config_from_bytes(self.files[CONFIG].read_all(), self.folder / CONFIG)

    @property
    def step(self) -> int:
        """Optimiser steps of the run when it was written."""
        return self.manifest.step

    @property
    def extra(self) -> dict[str, Any]:
        """What the trainer kept: schedule, data position."""
        return self.manifest.extra

    @property
    def layout(self) -> dict[str, Any]:
        """The layout that wrote it."""
        return self.manifest.layout

    @property
    def names(self) -> list[str]:
        """Global names of all weights, frozen ones included."""
        return [key.removeprefix("model/") for key in self.manifest.tensors if key.startswith("model/")]

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored global shape of a weight."""
        return self._stored(f"model/{name}").shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a weight: fp32 where a run wrote it, the source's where it was imported."""
        return DTYPES[self._stored(f"model/{name}").dtype]

    def tensor(self, name: str) -> Tensor:
        """A weight in its stored global form, on the CPU, in the stored type."""
        return self.read(f"model/{name}")

    def read(self, key: str) -> Tensor:
        """Any stored tensor by its key: `model/<name>`, `optimizer/exp_avg/<name>`, ..."""
        stored = self._stored(key)
        return self.read_box(key, Box((0,) * len(stored.shape), stored.shape))

    def read_box(self, key: str, box: Box, out: Tensor | None = None) -> Tensor:
        """A box of a stored tensor; into `out` (of the box's size, any type and device) if given."""
        progress.mark("load")
        stored = self._stored(key)
        boxes = self.index[key]
        if out is None:
            if len(boxes) == 1 and boxes[0][1].box == box:  # nothing to put together: what was read is the answer
                return boxes[0][0].read(boxes[0][1], box)
            out = torch.empty(box.size, dtype=DTYPES[stored.dtype])
        missing = box.numel
        for file, entry in self._near(key, box):
            part = intersect(entry.box, box)
            if part is not None:
                place = tuple(slice(a - b, a - b + n) for a, b, n in zip(part.offset, box.offset, part.size, strict=True))
                out[place].copy_(file.read(entry, part))
                missing -= part.numel
        if missing:
            raise CheckpointError(f"{self.folder}: {key}: {missing} of the {box.numel} entries at {box.offset} are not stored")
        return out

    def verify(self) -> None:
        """Compare every byte of every file with its checksum."""
        for file in self.files.values():
            file.verify()

    def check_model(self) -> None:
        """Compare names and shapes with what `config.model` consists of. Raises CheckpointError with the whole list."""
        wanted = {weight.name: weight.shape for weight in weights(self.config.model)}
        stored = {name: self.shape(name) for name in self.names}
        wrong = [f"{name} is missing" for name in wanted if name not in stored]
        wrong += [f"{name} is not part of the model" for name in stored if name not in wanted]
        wrong += [f"{n} is {stored[n]} instead of {wanted[n]}" for n in wanted if n in stored and stored[n] != wanted[n]]
        if wrong:
            raise CheckpointError(f"{self.folder} does not hold the model of its {CONFIG}: {'; '.join(wrong)}")

    def _index(self) -> None:
        """Which boxes make up every tensor; they must make up all of it."""
        for file in self.files.values():
            for entry in file.boxes if isinstance(file, BoxFile) else ():
                if entry.key not in self.index:
                    raise CheckpointError(f"{file.path}: holds {entry.key}, which the checkpoint does not list")
                self.index[entry.key].append((file, entry))
        wrong = []
        for key, tensor in self.manifest.tensors.items():
            entries = [entry for _, entry in self.index[key]]
            rank = len(tensor.shape)
            if any(len(e.box.size) != rank or DTYPE_NAMES[e.dtype] != tensor.dtype for e in entries):
                wrong.append(f"{key} is stored with another type or number of dimensions")
                continue
            low = numpy.array([e.box.offset for e in entries], dtype=numpy.int64).reshape(len(entries), rank)
            high = low + numpy.array([e.box.size for e in entries], dtype=numpy.int64).reshape(len(entries), rank)
            found = sum(e.box.numel for e in entries)
            if (low < 0).any() or (high > numpy.array(tensor.shape, dtype=numpy.int64)).any():
                wrong.append(f"{key} has boxes outside its shape {tensor.shape}")
            elif found != math.prod(tensor.shape):
                wrong.append(f"{key} of shape {tensor.shape} has {found} entries stored, {math.prod(tensor.shape)} expected")
            self.bounds[key] = (low, high)
        if wrong:
            raise CheckpointError(f"{self.folder}: {'; '.join(wrong)}")

    def _near(self, key: str, box: Box) -> list[tuple[BoxFile, StoredBox]]:
        """The stored boxes that share entries with `box`."""
        low, high = self.bounds[key]
        offset = numpy.array(box.offset, dtype=numpy.int64)
        touching = ((low < offset + numpy.array(box.size, dtype=numpy.int64)) & (high > offset)).all(axis=1)
        return [self.index[key][i] for i in touching.nonzero()[0]]

    def _stored(self, key: str) -> StoredTensor:
        if key not in self.manifest.tensors:
            raise CheckpointError(f"{self.folder}: holds no tensor {key}")
        return self.manifest.tensors[key]

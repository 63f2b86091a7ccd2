"""Write a checkpoint of weights from one process, tensor by tensor: what an import of other people's weights produces."""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from htc_megatron.checkpoint.box_file import DTYPE_NAMES, FileRecord, Piece, write_boxes, write_bytes
from htc_megatron.checkpoint.boxes import Box
from htc_megatron.checkpoint.errors import CheckpointError
from htc_megatron.checkpoint.folder import begin, commit, discard
from htc_megatron.checkpoint.manifest import CONFIG, Manifest, StoredTensor, check_json, config_to_bytes
from htc_megatron.checkpoint.reader import SUFFIX
from htc_megatron.checkpoint.shards import Place
from htc_megatron.config import RunConfig
from htc_megatron.weights.table import weights


class CheckpointWriter:
    """`with CheckpointWriter(root, config) as writer: writer.add(name, tensor)` for every weight; complete at the block's end.

    Tensors come in their stored global form and keep their type. Files are written in a thread while further tensors come; at
    most two files of `file_bytes` and two tensors are held in memory.
    At the end the weights must be exactly those of `config.model`: CheckpointError lists what is missing. `folder` is
    then the finished checkpoint. After any error nothing is left behind.
    """

    def __init__(
        self, root: str | Path, config: RunConfig, *, step: int = 0, extra: dict[str, Any] | None = None, file_bytes: int = 256 << 20
    ):
        self.config, self.step, self.extra, self.file_bytes = config, step, check_json(extra or {}), file_bytes
        self.expected = {weight.name: weight.shape for weight in weights(config.model)}
        self.pieces: list[Piece] = []
        self.tensors: dict[str, StoredTensor] = {}
        self.files: dict[str, FileRecord] = {}
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: tuple[str, Future[FileRecord]] | None = None
        self.folder = begin(Path(root), step)

    def add(self, name: str, tensor: Tensor) -> None:
        """One weight. Raises CheckpointError if the model has no such weight, it was added before or has another shape."""
        key, shape = f"model/{name}", tuple(tensor.shape)
        if name not in self.expected:
            raise CheckpointError(f"{name} is not a weight of this model")
        if key in self.tensors:
            raise CheckpointError(f"{name} was written before")
        if shape != self.expected[name]:
            raise CheckpointError(f"{name} has shape {shape}, {self.expected[name]} is wanted")
        self.tensors[key] = StoredTensor(shape, DTYPE_NAMES[tensor.dtype])
        self.pieces.append(Piece(key, Box((0,) * len(shape), shape), tensor, tensor.dtype))
        if sum(math.prod(piece.box.size) * piece.dtype.itemsize for piece in self.pieces) >= self.file_bytes:
            self._flush()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        unfinished = self.folder
        try:
            if kind is None:
                self._finish()
        finally:
            self.thread.shutdown()
            if self.folder == unfinished:
                discard(unfinished)

    def _flush(self) -> None:
        self._wait()
        if self.pieces:
            name = f"part_{len(self.files):05d}{SUFFIX}"
            self.writing = name, self.thread.submit(write_boxes, self.folder / name, self.pieces)
            self.pieces = []

    def _wait(self) -> None:
        """Wait for the file that is being written. Raises what went wrong with it."""
        if self.writing is not None:
            name, record = self.writing
            self.files[name], self.writing = record.result(), None

    def _finish(self) -> None:
        missing = [name for name in self.expected if f"model/{name}" not in self.tensors]
        if missing:
            raise CheckpointError(f"{len(missing)} weights of this model are missing: {', '.join(missing)}")
        self._flush()
        self._wait()
        self.files[CONFIG] = write_bytes(self.folder / CONFIG, config_to_bytes(self.config))
        Manifest(self.step, None, Place().layout(), self.tensors, self.files, self.extra).write(self.folder)
        self.folder = commit(self.folder)

"""One rank's file: safetensors whose entries are boxes of global tensors, with a CRC-32 for every block of it.

An entry's name is `<global tensor>[<offset>]`, for example `model/backbone.output_layer.weight[128,0]`; its shape is the
box's size. Any safetensors reader opens the file. The checksums (kept in the checkpoint's manifest) stand for fixed
blocks, so a reader checks exactly the bytes it uses and never reads a whole file for a part of it.
"""

import errno
import fcntl
import io
import json
import math
import mmap
import os
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from htc_megatron.checkpoint.boxes import Box
from htc_megatron.checkpoint.errors import CheckpointError
from htc_megatron.parallel import progress

BLOCK = 4 << 20  # bytes that share a checksum in new files; what the smallest read costs
DIRECT = getattr(os, "O_DIRECT", 0)
HEADER_LIMIT = 100_000_000  # bytes, safetensors' own limit
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileRecord:
    """What the manifest keeps of a file: its length in bytes and the CRC-32 of each block of `block` bytes."""

    bytes: int
    block: int
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class StoredBox:
    """An entry of a file: which box of which tensor, its type and its first and last byte (exclusive) in the file."""

    key: str
    box: Box
    dtype: torch.dtype
    begin: int
    end: int


class Piece(NamedTuple):
    """Data for a file: a box of a global tensor, its elements (any device) and the type they are stored in."""

    key: str
    box: Box
    data: Tensor
    dtype: torch.dtype


class CheckedWriter:
    """A new file that is summed block by block while it is written, and is on disk when `close` returns its record.

    Blocks go past the page cache where the file system lets them (O_DIRECT): a checkpoint is not read again soon, and the kernel's
    copying of it would take memory and processor time from the training that goes on beside.
    """

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.direct = BLOCK % mmap.PAGESIZE == 0 and self._set_direct(True)
        self.memory = mmap.mmap(-1, BLOCK)  # begins at a page, as O_DIRECT wants
        self.buffer = numpy.frombuffer(self.memory, dtype=numpy.uint8)
        self.length, self.filled, self.sums = 0, 0, []

    def write(self, data: bytes | memoryview) -> None:
        rest = numpy.frombuffer(data, dtype=numpy.uint8)
        while len(rest):
            part, rest = rest[: BLOCK - self.filled], rest[BLOCK - self.filled :]
            numpy.copyto(self.buffer[self.filled : self.filled + len(part)], part)
            self.filled += len(part)
            if self.filled == BLOCK:
                self._flush()
                progress.mark("save")  # where training waits for it: a large file is no sign of a hang

    def close(self) -> FileRecord:
        try:
            if self.filled:
                self._set_direct(False)  # it takes whole pages only
                self._flush()
            os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)
        return FileRecord(self.length, BLOCK, tuple(self.sums))

    def _flush(self) -> None:
        block = self.buffer[: self.filled].data
        self.sums.append(zlib.crc32(block))
        written = 0
        while written < len(block):
            try:
                written += os.write(self.descriptor, block[written:])
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self.direct = self._set_direct(False)  # a file system that allows O_DIRECT and then takes none, or a part of a block
        self.length += written
        self.filled = 0

    def _set_direct(self, on: bool) -> bool:
        """Whether writes go past the page cache from now on, as far as the file system can."""
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags | DIRECT if on else flags & ~DIRECT)
        except OSError:
            return False
        return on and bool(DIRECT)


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """A whole small file, on disk when this returns."""
    writer = CheckedWriter(path)
    writer.write(data)
    return writer.close()


def write_boxes(path: Path, pieces: Iterable[Piece]) -> FileRecord:
    """Write pieces and return the file's record. At most one of them is copied or converted at a time."""
    if sys.byteorder != "little":
        raise CheckpointError(f"{path}: safetensors are little-endian, this machine is not")
    ordered = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)  # keeps every entry aligned to its own type
    header, at = {}, 0
    for key, box, data, dtype in ordered:
        if data.numel() != box.numel:
            raise CheckpointError(f"{key}: {data.numel()} elements for a box of {box.size}")
        name = f"{key}[{','.join(map(str, box.offset))}]"
        if name in header:
            raise CheckpointError(f"{name} would be stored twice in {path.name}")
        length = box.numel * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(box.size), "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writer = CheckedWriter(path)
    writer.write(len(text).to_bytes(8, "little") + text)
    for piece in ordered:
        if piece.box.numel:
            data = piece.data.detach().to("cpu", piece.dtype).contiguous()
            writer.write(data.reshape(-1).view(torch.uint8).numpy().data)
    return writer.close()


class BlockCache:
    """The last few blocks of which only a part was wanted, shared by all files of a reader."""

    def __init__(self, blocks: int = 8):
        self.limit = blocks
        self.blocks: OrderedDict[tuple[Path, int], bytearray] = OrderedDict()

    def get(self, key: tuple[Path, int]) -> bytearray | None:
        if key in self.blocks:
            self.blocks.move_to_end(key)
        return self.blocks.get(key)

    def put(self, key: tuple[Path, int], data: bytearray) -> None:
        self.blocks[key] = data
        while len(self.blocks) > self.limit:
            self.blocks.popitem(last=False)


class CheckedReader:
    """A file whose every byte is compared with the record's checksums before it is handed out. Holds no open file."""

    def __init__(self, path: Path, record: FileRecord, cache: BlockCache | None = None):
        self.path, self.record, self.cache = path, record, cache or BlockCache()

    def read_into(self, begin: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `begin` on."""
        at, end, size = begin, begin + len(out), self.record.block
        with open(self.path, "rb", buffering=0) as file:
            while at < end:
                block = at // size
                first, last = block * size, min((block + 1) * size, self.record.bytes)
                stop = min(last, end)
                target = out[at - begin : stop - begin]
                data = self.cache.get((self.path, block))
                if data is None and (at, stop) == (first, last):  # a whole block goes straight to where it belongs
                    self._fill(file, block, target)
                else:
                    if data is None:
                        data = bytearray(last - first)
                        self._fill(file, block, memoryview(data))
                        self.cache.put((self.path, block), data)
                    target[:] = data[at - first : stop - first]
                at = stop

    def read_all(self) -> bytes:
        data = bytearray(self.record.bytes)
        self.read_into(0, memoryview(data))
        return bytes(data)

    def verify(self) -> None:
        """Compare the whole file with its checksums."""
        size = self.record.block
        buffer = memoryview(bytearray(min(size, self.record.bytes)))
        with open(self.path, "rb", buffering=0) as file:
            for block in range(len(self.record.crc32)):
                self._fill(file, block, buffer[: min(size, self.record.bytes - block * size)])

    def _fill(self, file: io.FileIO, block: int, out: memoryview) -> None:
        """Read one block, whole, and check it."""
        begin, done = block * self.record.block, 0
        file.seek(begin)
        while done < len(out):
            count = file.readinto(out[done:])
            if not count:
                raise CheckpointError(f"{self.path}: ends at byte {begin + done}, {self.record.bytes} bytes expected")
            done += count
        if zlib.crc32(out) != self.record.crc32[block]:
            raise CheckpointError(f"{self.path}: bytes {begin} to {begin + done} are damaged (their CRC-32 does not match)")


class BoxFile(CheckedReader):
    """The boxes of one rank's file. `boxes` lists them; `read` hands out one, or a part of it."""

    def __init__(self, path: Path, record: FileRecord, cache: BlockCache | None = None):
        super().__init__(path, record, cache)
        try:
            self.boxes = self._parse()
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: no readable safetensors header ({error})") from error

    def _parse(self) -> list[StoredBox]:
        head = bytearray(8)
        self.read_into(0, memoryview(head))
        length = int.from_bytes(head, "little")
        if not 0 < length <= min(HEADER_LIMIT, self.record.bytes - 8):
            raise ValueError(f"a header of {length} bytes in a file of {self.record.bytes}")
        text = bytearray(length)
        self.read_into(8, memoryview(text))
        boxes = []
        for name, entry in json.loads(bytes(text)).items():
            key, _, place = name.removesuffix("]").rpartition("[")
            box = Box(tuple(int(x) for x in place.split(",") if x), tuple(int(x) for x in entry["shape"]))
            dtype = DTYPES[entry["dtype"]]
            begin, end = entry["data_offsets"]
            fits = 0 <= begin <= end <= self.record.bytes - 8 - length
            if not key or len(box.offset) != len(box.size) or not fits or end - begin != box.numel * dtype.itemsize:
                raise ValueError(f"entry {name} of shape {box.size} at bytes {begin} to {end}")
            boxes.append(StoredBox(key, box, dtype, 8 + length + begin, 8 + length + end))
        return boxes

    def read(self, stored: StoredBox, part: Box) -> Tensor:
        """The elements of `part`, a box of the global tensor that lies inside `stored`. CPU, the stored type, shape part.size."""
        inside = tuple(a - b for a, b in zip(part.offset, stored.box.offset, strict=True))
        size = stored.box.size
        dim = next((d for d, extent in enumerate(size) if extent > 1), max(len(size) - 1, 0))
        # Only the first dimension that has any extent is cut while reading; the rest of it is contiguous in the file.
        rows, first = (part.size[dim], inside[dim]) if size else (1, 0)
        row_bytes = math.prod(size[dim + 1 :]) * stored.dtype.itemsize
        data = torch.empty((*size[:dim], rows, *size[dim + 1 :]) if size else (), dtype=stored.dtype)
        if data.numel():
            self.read_into(stored.begin + first * row_bytes, data.reshape(-1).view(torch.uint8).numpy().data)
        for later in range(dim + 1, len(size)):
            data = data.narrow(later, inside[later], part.size[later])
        return data

"""The data set on disk: safetensors shards, mapped into memory, and an index.json that says what they hold.

A shard of n samples and m distinct images:
    tokens          [T] int32      unexpanded ids of all samples, -200 at images
    supervised      [T] uint8      1 where a token carries loss
    token_offsets   [n + 1] int64
    sample_images   [R] int32      images of all samples, as numbers in this shard
    image_refs      [n + 1] int64  offsets into sample_images
    image_bytes     [B] uint8      the files as they were
    image_offsets   [m + 1] int64
    codes           [m, positions, groups] int16   absent without MGVQ
    names, name_offsets            the records' ids as UTF-8
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from htc_megatron.config import ConfigError
from htc_megatron.data.conversation import IMAGE_TOKEN_INDEX, Sample

FORMAT = 1
INDEX = "index.json"
DTYPES = {
    "tokens": np.int32, "supervised": np.uint8, "token_offsets": np.int64, "sample_images": np.int32, "image_refs": np.int64,
    "image_bytes": np.uint8, "image_offsets": np.int64, "codes": np.int16, "names": np.uint8, "name_offsets": np.int64,
}  # fmt: skip


@dataclass
class ShardEntry:
    """One shard in the index. text_tokens, image_counts: a number for every sample. sha256: of the file; "" in older indices."""

    file: str
    size: int
    images: int
    text_tokens: list[int]
    image_counts: list[int]
    sha256: str = ""


@dataclass
class Index:
    """What a folder of shards holds and what made it.

    tokenizer: fingerprint, vocab_size (with <voco>), voco_token_id. template: name and system prompt.
    mgvq: fingerprint, positions, groups, image_size; None without codes. counts: totals, and records left out.
    """

    tokenizer: dict
    template: dict
    mgvq: dict | None
    counts: dict
    shards: list[ShardEntry] = field(default_factory=list)
    part: list[int] = field(default_factory=lambda: [0, 1])
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        path = folder / INDEX
        path.write_text(json.dumps(asdict(self)))
        fsync(path)

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Raises ConfigError where the file is missing, not JSON, of another format or not whole."""
        path = folder / INDEX
        if not path.is_file():
            raise ConfigError(f"data {folder}: there is no {INDEX}; wanted a folder written by tools/prepare_data.py")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(raw, dict) or raw.get("format") != FORMAT:
                seen = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
                raise ConfigError(f"{path}: format is {seen}, this version reads format {FORMAT}: prepare the data again")
            index = cls(**{**raw, "shards": [ShardEntry(**entry) for entry in raw["shards"]]})
            whole = all(len(s.text_tokens) == len(s.image_counts) and s.images >= 0 and s.size > 0 for s in index.shards)
            samples = sum(len(s.text_tokens) for s in index.shards)
            tokenizer_keys = {"fingerprint", "vocab_size", "voco_token_id"}
            if not whole or samples != index.counts["samples"] or not tokenizer_keys <= index.tokenizer.keys():
                raise ValueError(f"it counts {index.counts['samples']} samples and lists {samples}")
            if index.mgvq is not None and not {"fingerprint", "positions", "groups"} <= index.mgvq.keys():
                raise ValueError("its mgvq entry lacks a key")
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: the index is damaged ({error}): prepare the data again") from None
        return index


class ShardBuilder:
    """Collects one shard in memory. Images are told apart by name and stored once."""

    def __init__(self):
        self.image_numbers: dict[str, int] = {}
        self.images: list[bytes] = []
        self.digests: list[bytes] = []  # image_digest of each
        self.codes: list[np.ndarray | None] = []  # of each; None: still on its way, or not wanted at all
        self.tokens: list[np.ndarray] = []
        self.supervised: list[np.ndarray] = []
        self.references: list[list[int]] = []
        self.names: list[bytes] = []
        self.bytes = 0

    def __len__(self) -> int:
        """Samples."""
        return len(self.tokens)

    def has_image(self, name: str) -> bool:
        return name in self.image_numbers

    def add_image(self, name: str, data: bytes, digest: bytes, codes: np.ndarray | None = None) -> int:
        """Returns its number in this shard."""
        number = self.image_numbers[name] = len(self.images)
        self.images.append(data)
        self.digests.append(digest)
        self.codes.append(codes)
        self.bytes += len(data)
        return number

    def add_sample(self, sample: Sample) -> None:
        """Its images must have been added."""
        self.tokens.append(np.array(sample.ids, dtype=np.int32))
        self.supervised.append(np.array(sample.supervised, dtype=np.uint8))
        self.references.append([self.image_numbers[name] for name in sample.images])
        self.names.append(sample.name.encode("utf-8", "replace"))
        self.bytes += 5 * len(sample.ids)

    def write(self, folder: Path, name: str, with_codes: bool) -> ShardEntry:
        """One safetensors file, synced to disk. with_codes: all images have theirs; a shard without images has none."""
        tensors = {
            "tokens": np.concatenate(self.tokens),
            "supervised": np.concatenate(self.supervised),
            "token_offsets": _offsets(self.tokens),
            "sample_images": np.array([i for images in self.references for i in images], dtype=np.int32),
            "image_refs": _offsets(self.references),
            "image_bytes": np.frombuffer(b"".join(self.images), dtype=np.uint8),
            "image_offsets": _offsets(self.images),
            "names": np.frombuffer(b"".join(self.names), dtype=np.uint8),
            "name_offsets": _offsets(self.names),
        }
        if with_codes and self.codes:
            tensors["codes"] = np.ascontiguousarray(np.stack(self.codes), dtype=np.int16)
        path = folder / name
        save_file(tensors, path)
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes it private, whatever the umask
        fsync(path)
        text = [int((ids != IMAGE_TOKEN_INDEX).sum()) for ids in self.tokens]
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return ShardEntry(name, path.stat().st_size, len(self.images), text, [len(images) for images in self.references], digest)


class ShardMissing(ConfigError, OSError):
    """A shard is not there: never was, or its storage is lost for a while."""


class Shard:
    """A shard's arrays, mapped read-only. Raises ConfigError where the file is missing, cut short or not what the index says."""

    def __init__(self, folder: Path, entry: ShardEntry):
        self.path, self.sha256 = folder / entry.file, entry.sha256
        if not self.path.is_file():
            raise ShardMissing(f"data shard {self.path}: it is missing")
        size = self.path.stat().st_size
        if size != entry.size:
            raise ConfigError(f"data shard {self.path}: it has {size} bytes, the index wants {entry.size}: prepare or copy the data again")
        self.arrays = _map_safetensors(self.path)
        samples, missing = len(entry.text_tokens), DTYPES.keys() - {"codes"} - self.arrays.keys()
        if missing:
            raise ConfigError(f"data shard {self.path}: it lacks {sorted(missing)}")
        seen = (len(self.arrays["token_offsets"]) - 1, len(self.arrays["image_offsets"]) - 1)
        if seen != (samples, entry.images):
            raise ConfigError(
                f"data shard {self.path}: it holds {seen[0]} samples and {seen[1]} images, the index wants {samples} and {entry.images}"
            )

    @property
    def num_images(self) -> int:
        return len(self.arrays["image_offsets"]) - 1

    @property
    def codes(self) -> np.ndarray | None:
        """[images, positions, groups] int16, or None."""
        return self.arrays.get("codes")

    def tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Unexpanded ids [t] int32 and supervised [t] bool of a sample."""
        begin, end = self._range("token_offsets", sample)
        return self.arrays["tokens"][begin:end], self.arrays["supervised"][begin:end].astype(bool)

    def images_of(self, sample: int) -> list[int]:
        """Numbers of a sample's images in this shard, in order."""
        begin, end = self._range("image_refs", sample)
        return self.arrays["sample_images"][begin:end].tolist()

    def image_bytes(self, image: int) -> bytes:
        begin, end = self._range("image_offsets", image)
        return self.arrays["image_bytes"][begin:end].tobytes()

    def name(self, sample: int) -> str:
        begin, end = self._range("name_offsets", sample)
        return self.arrays["names"][begin:end].tobytes().decode("utf-8")

    def _range(self, offsets: str, number: int) -> tuple[int, int]:
        table = self.arrays[offsets]
        return int(table[number]), int(table[number + 1])


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _offsets(items: Sequence) -> np.ndarray:
    return np.cumsum([0] + [len(item) for item in items], dtype=np.int64)


def _map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as a view of one memory map: a read touches its own pages only."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    try:
        start = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        arrays = {}
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            if end > len(data):
                raise ValueError(f"{name} ends behind the file")
            arrays[name] = np.frombuffer(data[begin:end], dtype=DTYPES[name]).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"data shard {path}: its header is damaged ({error}): prepare or copy the data again") from None
    return arrays

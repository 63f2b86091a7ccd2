"""A prepared data set, checked against the run that wants to train on it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from htc_megatron.config import ConfigError, ModelConfig
from htc_megatron.data.shards import INDEX, Index, Shard
from htc_megatron.data.tokenizer import check_tokenizer


class PreparedData:
    """Samples of a folder written by tools/prepare_data.py, or of a folder of its parts (part-I-of-N), by one running number.

    text_tokens, image_counts: [samples] int64. Shards are mapped when first read; safe to read from several threads.
    Raises ConfigError where the folder, its index or a shard is missing or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ConfigError(f"data {str(path)!r}: no such folder; wanted one written by tools/prepare_data.py")
        self.folders = _part_folders(self.path)
        self.indices = [Index.read(folder) for folder in self.folders]
        first = self.indices[0]
        for folder, index in zip(self.folders, self.indices, strict=True):
            if (index.tokenizer, index.template, index.mgvq) != (first.tokenizer, first.template, first.mgvq):
                raise ConfigError(f"data {folder}: it was prepared with another tokenizer, template or MGVQ than {self.folders[0]}")
        self._entries = [(f, s) for f, i in zip(self.folders, self.indices, strict=True) for s in i.shards]
        self._shards: list[Shard | None] = [None] * len(self._entries)
        self._lock = threading.Lock()
        self._first = np.cumsum([0] + [len(s.text_tokens) for _, s in self._entries])  # running number of each shard's first sample
        self.text_tokens = np.array([n for _, s in self._entries for n in s.text_tokens], dtype=np.int64)
        self.image_counts = np.array([n for _, s in self._entries for n in s.image_counts], dtype=np.int64)
        for folder, entry in self._entries:  # a cut or missing file shows before the first step, not in the middle of an epoch
            file = folder / entry.file
            if not file.is_file() or file.stat().st_size != entry.size:
                Shard(folder, entry)

    def __len__(self) -> int:
        return len(self.text_tokens)

    @property
    def index(self) -> Index:
        """Tokenizer, template and MGVQ of the whole set."""
        return self.indices[0]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the samples are and in which order, wherever the folder lies: from the index, no shard is read.

        Preparing the same records again gives the same, with the same shard_bytes and parts. Of a folder whose index is older
        than its shards' sums, it tells only the samples' lengths, their images' number and the files' sizes.
        """
        shards = [(s.sha256, s.size, s.images, s.text_tokens, s.image_counts) for _, s in self._entries]
        return hashlib.sha256(json.dumps([self.index.tokenizer["fingerprint"], shards]).encode()).hexdigest()

    def locate(self, sample: int) -> tuple[Shard, int]:
        """The shard of a sample and its number there."""
        number = int(np.searchsorted(self._first, sample, side="right")) - 1
        with self._lock:
            if self._shards[number] is None:
                self._shards[number] = Shard(*self._entries[number])
        return self._shards[number], sample - int(self._first[number])

    def shards(self) -> Iterator[Shard]:
        """All of them, in order."""
        for folder, entry in self._entries:
            yield Shard(folder, entry)

    def lengths(self, model: ModelConfig) -> np.ndarray:
        """Tokens of every sample with its images expanded. [samples] int64."""
        return self.text_tokens + self.image_counts * model.tokens_per_image

    def check(self, model: ModelConfig, tokenizer_fingerprint: str = "", mgvq_fingerprint: str = "") -> None:
        """Refuse data prepared for another model: its vocabulary, and its codes where the discrete channel wants them.

        Empty fingerprints are not compared. Raises ConfigError.
        """
        made_by = self.index.tokenizer
        check_tokenizer(made_by["vocab_size"], made_by["voco_token_id"], model, f"the tokenizer that prepared {self.path}")
        if tokenizer_fingerprint and tokenizer_fingerprint != made_by["fingerprint"]:
            raise ConfigError(
                f"tokenizer: its fingerprint is {tokenizer_fingerprint[:12]}, but {self.path} was prepared with "
                f"{made_by['fingerprint'][:12]}: name that tokenizer, or prepare the data again"
            )
        if not model.has_mgvq:
            return
        codes = self.index.mgvq
        if codes is None:
            if self.image_counts.any():
                raise ConfigError(
                    f"model.method.channels is {model.method.channels}, but {self.path} holds no MGVQ codes: prepare it with --mgvq, "
                    "or set channels to continuous or anchor_source to another than mgvq"
                )
            return
        seen, wanted = (codes["positions"], codes["groups"]), (model.mgvq.grid**2, model.mgvq.groups)
        if seen != wanted:
            raise ConfigError(
                f"data {self.path}: an image has codes of shape {seen} (positions, groups), model.mgvq with image_size "
                f"{model.mgvq.image_size} and groups {model.mgvq.groups} wants {wanted}"
            )
        if mgvq_fingerprint and mgvq_fingerprint != codes["fingerprint"]:
            raise ConfigError(
                f"mgvq_checkpoint: its fingerprint is {mgvq_fingerprint[:12]}, but the codes of {self.path} were made with "
                f"{codes['fingerprint'][:12]}: name that checkpoint, or prepare the data again"
            )


def _part_folders(path: Path) -> list[Path]:
    """The folder itself, or its parts in order. Raises ConfigError where a part is missing."""
    parts = sorted(p for p in path.glob("part-*-of-*") if p.is_dir())
    if (path / INDEX).exists() or not parts:
        return [path]
    count = parts[0].name.rsplit("-", 1)[1]
    wanted = [path / f"part-{i}-of-{count}" for i in range(int(count) if count.isdigit() else 0)]
    missing = [p.name for p in wanted if not p.is_dir()]
    if missing or len(wanted) != len(parts):
        raise ConfigError(
            f"data {path}: it holds {[p.name for p in parts]}, wanted all of part-0-of-{count} to the last; missing: {missing}"
        )
    return wanted

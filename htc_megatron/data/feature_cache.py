"""What a frozen vision tower makes of the images of prepared shards, on disk: computed once, read ever after.

<folder>/<tower>/<shard>.features has a slot for each of a shard's images:

    features   [patches, h] in the run's precision
    sum        BLAKE2b-128 of the image's bytes and the features; zeros where nothing was written

filled up to whole pages. `tower` is a hash of all that decides features beside the image (`tower_key`), so those of another tower
lie in another folder. Nothing is locked: ranks and machines that share the folder write equal slots, each with one call, and a slot
whose sum is not that of its content, half written or torn between two writers, counts as empty.
"""

import hashlib
import json
import os
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from htc_megatron.config import ConfigError, VisionConfig
from htc_megatron.data.dataset import PreparedData
from htc_megatron.data.shards import Shard

FORMAT = 1  # to be changed with anything that changes features or slots: the preparation of pixels, the order of a slot's parts
SUM, PAGE = 16, 4096


def tower_key(weights: str, vision: VisionConfig, dtype: torch.dtype) -> str:
    """Name of a tower's folder. weights: a hash of its weights' values."""
    what = {"format": FORMAT, "weights": weights, "precision": str(dtype), "vision": asdict(vision)}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def check_sums(data: PreparedData) -> None:
    """Refuse data whose index has no sums of its shards, which features are filed under. Raises ConfigError."""
    if any(not shard.sha256 for index in data.indices for shard in index.shards):
        raise ConfigError(f"data.feature_cache: the index of {data.path} is too old to tell its shards apart: prepare the data again")


class FeatureCache:
    """Reads and writes features by (shard, image). Safe to use from several threads and processes.

    folder: data.feature_cache. tower: its tower_key. Raises ConfigError where the folder cannot be made.
    """

    def __init__(self, folder: str | Path, tower: str, vision: VisionConfig, dtype: torch.dtype):
        self.folder = Path(folder) / tower
        self.shape, self.dtype = (vision.num_patches, vision.hidden_size), dtype
        self.bytes = vision.num_patches * vision.hidden_size * dtype.itemsize
        self.stride = -(-(self.bytes + SUM) // PAGE) * PAGE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.feature_cache: {self.folder} cannot be made: {error.strerror}") from None
        self._files: dict[str, tuple[int, np.ndarray]] = {}
        self._lock = threading.Lock()

    def size_of(self, data: PreparedData) -> int:
        """Bytes on disk once the features of all its images are there."""
        return self.stride * sum(shard.images for index in data.indices for shard in index.shards)

    def read(self, shard: Shard, image: int) -> Tensor | None:
        """[patches, h], or None where they are not there whole."""
        slot = self._file(shard)[1][image]
        expected = slot[self.bytes : self.bytes + SUM].tobytes()
        if not any(expected):
            return None
        content = np.array(slot[: self.bytes])  # what is summed is what is handed out: the file may be written to meanwhile
        if self._sum(shard, image, content) != expected:
            return None
        return torch.from_numpy(content).view(self.dtype).view(self.shape)

    def write(self, shard: Shard, image: int, features: Tensor) -> None:
        """features: [patches, h] in the cache's precision. Raises OSError, as on a full disk; what is there then is no slot."""
        if features.shape != self.shape or features.dtype != self.dtype:
            raise ValueError(f"features are {tuple(features.shape)} {features.dtype}, the cache holds {self.shape} {self.dtype}")
        content = features.contiguous().view(-1).view(torch.uint8).numpy()
        left = memoryview(content.tobytes() + self._sum(shard, image, content))
        descriptor, at = self._file(shard)[0], image * self.stride
        while left:
            written = os.pwrite(descriptor, left, at)
            left, at = left[written:], at + written

    def close(self) -> None:
        with self._lock:
            for descriptor, _ in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _sum(self, shard: Shard, image: int, features: np.ndarray) -> bytes:
        digest = hashlib.blake2b(shard.image_bytes(image), digest_size=SUM)
        digest.update(features)
        return digest.digest()

    def _file(self, shard: Shard) -> tuple[int, np.ndarray]:
        """Descriptor and map [images, stride] of a shard's file, made as one hole where it is new."""
        with self._lock:
            if shard.sha256 not in self._files:
                path, size = self.folder / f"{shard.sha256}.features", shard.num_images * self.stride
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                if os.fstat(descriptor).st_size != size:
                    os.ftruncate(descriptor, size)  # a second process that does so too changes nothing
                self._files[shard.sha256] = descriptor, np.memmap(path, np.uint8, "r", shape=(shard.num_images, self.stride))
            return self._files[shard.sha256]

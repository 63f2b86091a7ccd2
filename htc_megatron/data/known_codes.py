"""MGVQ codes of images that were prepared before, found by the images' bytes: an image is encoded once, whoever names it."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from htc_megatron.config import ConfigError
from htc_megatron.data.dataset import PreparedData
from htc_megatron.data.shards import Shard


def image_digest(data: bytes) -> bytes:
    """What tells an image's file content from all others. [32] bytes"""
    return hashlib.sha256(data).digest()


class KnownCodes:
    """Codes by image_digest. Of each only its place in a mapped shard is held.

    folders: earlier outputs of preparation, read whole once to learn their images' digests. made_by: the MGVQ wanted, as
    CodeEncoder.describe gives it. Raises ConfigError where a folder's codes are another MGVQ's, or it has none.
    """

    def __init__(self, folders: Iterable[Path] = (), made_by: dict | None = None):
        self._places: dict[bytes, tuple[Shard, int]] = {}
        for folder in folders:
            data = PreparedData(folder)
            seen = data.index.mgvq
            if seen is None or seen != made_by:
                text = "no codes" if seen is None else f"codes of MGVQ {seen['fingerprint'][:12]} at {seen['image_size']} pixels"
                wanted = f"{made_by['fingerprint'][:12]} at {made_by['image_size']} pixels" if made_by else "none, as no MGVQ is named"
                raise ConfigError(f"--codes-from {folder}: it has {text}, wanted {wanted}")
            for shard in data.shards():
                self.add(shard, [image_digest(shard.image_bytes(image)) for image in range(shard.num_images)])

    def __len__(self) -> int:
        return len(self._places)

    def add(self, shard: Shard, digests: list[bytes]) -> None:
        """Take in a shard's images, one digest each."""
        for image, digest in enumerate(digests):
            self._places.setdefault(digest, (shard, image))

    def get(self, digest: bytes) -> np.ndarray | None:
        """[positions, groups] int16, or None."""
        place = self._places.get(digest)
        return None if place is None else np.array(place[0].codes[place[1]])

"""Images' keys and values on disk: each image is compressed once, and its voco tokens' keys and values serve any question later.

A store is a folder of safetensors files, each of which holds n images and says by itself what it holds, so that there is no index to
fall out of step and several programs may write into one store:
    keys_values  [n, layers, 2, heads, K, head_dim]  as if each image began at RoPE position 0 (hf/image_htc_vlm.py)
    images       [n, 32] uint8   SHA-256 of each image file's bytes
    checks       [n] int64       CRC-32 of an image's SHA-256 and its keys and values
Metadata: `format`, and `model`, the fingerprint of what made them. An image is found by the bytes of its file: the same picture in
another file is another image, and nothing must be decoded to see that an image is there.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from htc_megatron.config import ConfigError
from htc_megatron.data.shards import fsync
from htc_megatron.hf.image_htc_vlm import kept_shape, why_not_alone
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.processing_htc_vlm import HTCVLMImageProcessor

FORMAT = "1"
SUFFIX = ".safetensors"
AGAIN = "remove the file and compress its images again"
NOT_IDENTITY = {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def file_key(image: str | os.PathLike | bytes) -> bytes:
    """SHA-256 of an image file's bytes, given by its path or as they are. Raises ConfigError where there is no such file."""
    if not isinstance(image, bytes):
        if not isinstance(image, (str, os.PathLike)):
            raise ConfigError(f"an image in a store is found by its file: got a {type(image).__name__}, wanted a path or the file's bytes")
        try:
            image = Path(image).read_bytes()
        except OSError as error:
            raise ConfigError(f"image {image} cannot be read: {error.strerror}") from None
    return hashlib.sha256(image).digest()


def model_fingerprint(model: HTCVLMForConditionalGeneration, pixels: HTCVLMImageProcessor) -> str:
    """SHA-256 of what decides an image's keys and values: weights as they are loaded, configuration, and how pixels are made."""

    def of_tensor(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    identity = [_identity(model.config.to_dict()), pixels.image_size, pixels.mgvq_image_size, pixels.channels]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # hashing lets the interpreter's lock go
        weights = list(threads.map(of_tensor, sorted(model.state_dict().items())))
    return hashlib.sha256(json.dumps([identity, weights], sort_keys=True, default=str).encode()).hexdigest()


def _identity(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _identity(value) for key, value in values.items() if key not in NOT_IDENTITY}
    return values


class ImageStore:
    """The store in `folder` of images that `model` compressed.

    Raises ConfigError where the model's images cannot be computed by themselves, where a file belongs to another model, or cannot be
    read. A folder that is not there is refused unless `create`.
    """

    def __init__(self, folder: str | Path, model: HTCVLMForConditionalGeneration, pixels: HTCVLMImageProcessor, create: bool = False):
        if reason := why_not_alone(model.config):
            raise ConfigError(f"images of this model cannot be stored: {reason}")
        self.folder, self.fingerprint, self.device = Path(folder), model_fingerprint(model, pixels), model.device
        self.shape, self.dtype = kept_shape(model.config), model.get_input_embeddings().weight.dtype
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
        elif not self.folder.is_dir():
            raise ConfigError(f"there is no store {folder}; tools/compress_images.py makes one")
        self._files: list[Path] = []
        self._keys = np.empty((0, 32), np.uint8)
        self._places = np.empty((0, 2), np.int64)  # file, row
        self._starts, self._order = np.empty(0, np.uint64), np.empty(0, np.int64)
        self._take(sorted(path for path in self.folder.glob(f"*{SUFFIX}") if not path.name.startswith(".")))

    def __len__(self) -> int:
        """Images in it, one that two files hold counted twice."""
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        """Whether the image whose file has this SHA-256 is there."""
        return self._place(key) is not None

    def load(self, images: Sequence[str | os.PathLike | bytes]) -> Tensor:
        """Keys and values of images, given by their files: [images, layers, 2, heads, K, head_dim], on the model's device.

        Raises ConfigError for an image that is not there or whose keys and values are damaged.
        """
        made = torch.empty(len(images), *self.shape, dtype=self.dtype)
        wanted: dict[int, list[tuple[int, int, bytes]]] = {}
        for number, image in enumerate(images):
            key = file_key(image)
            place = self._place(key)
            if place is None:
                name = "of these bytes" if isinstance(image, bytes) else image
                raise ConfigError(f"image {name} is not in the store {self.folder}; tools/compress_images.py puts it there")
            wanted.setdefault(place[0], []).append((number, place[1], key))
        for file, rows in wanted.items():
            path = self._files[file]
            with self._opened(path) as opened:
                keys_values, checks = opened.get_slice("keys_values"), opened.get_tensor("checks")
                for number, row, key in rows:
                    made[number] = keys_values[row]
                    if _check(key, made[number]) != int(checks[row]):
                        raise ConfigError(f"store file {path}: the keys and values of image {key.hex()} are damaged; {AGAIN}")
        return made.to(self.device)

    def write(self, keys: Sequence[bytes], keys_values: Tensor) -> Path:
        """A file of images [n, layers, 2, heads, K, head_dim] under their SHA-256; it is there whole or not at all."""
        kept = keys_values.detach().cpu().contiguous()
        images = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 32)
        checks = torch.tensor([_check(key, row) for key, row in zip(keys, kept, strict=True)])
        path = self.folder / f"images-{hashlib.sha256(b''.join(keys)).hexdigest()[:16]}{SUFFIX}"
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            tensors = {"keys_values": kept, "images": images, "checks": checks}
            save_file(tensors, partial, metadata={"format": FORMAT, "model": self.fingerprint})
            fsync(partial)
            os.replace(partial, path)
            fsync(self.folder)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"store file {path} cannot be written: {error}") from None
        finally:
            partial.unlink(missing_ok=True)
        self._take([path])
        return path

    @staticmethod
    @contextmanager
    def _opened(path: Path) -> Iterator[safe_open]:
        try:
            with safe_open(path, framework="pt") as opened:
                yield opened
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"store file {path} cannot be read: {error}; {AGAIN}") from None

    def _take(self, paths: Sequence[Path]) -> None:
        """Know the images of further files."""
        keys, places = [self._keys], [self._places]
        for path in paths:
            with self._opened(path) as opened:
                found = opened.metadata() or {}
                if found.get("format") != FORMAT:
                    raise ConfigError(f"store file {path} is of format {found.get('format')!r}, wanted {FORMAT!r}")
                if found.get("model") != self.fingerprint:
                    seen, wanted = str(found.get("model"))[:12], self.fingerprint[:12]
                    raise ConfigError(f"store file {path} was made by another model: its fingerprint is {seen}, wanted {wanted}")
                images = opened.get_tensor("images").numpy()
                shape, wanted = tuple(opened.get_slice("keys_values").get_shape()), (len(images), *self.shape)
                if shape != wanted:
                    raise ConfigError(f"store file {path} has keys and values of shape {shape}, wanted {wanted}; {AGAIN}")
            keys.append(images)
            places.append(np.stack([np.full(len(images), len(self._files)), np.arange(len(images))], 1))
            self._files.append(path)
        self._keys, self._places = np.concatenate(keys), np.concatenate(places)
        starts = np.ascontiguousarray(self._keys[:, :8]).view(np.uint64)[:, 0]
        self._order = np.argsort(starts, kind="stable")
        self._starts = starts[self._order]

    def _place(self, key: bytes) -> tuple[int, int] | None:
        whole = np.frombuffer(key, np.uint8)
        start = whole[:8].view(np.uint64)[0]
        first, last = (np.searchsorted(self._starts, start, side) for side in ("left", "right"))
        for entry in self._order[first:last]:
            if np.array_equal(self._keys[entry], whole):
                return tuple(self._places[entry].tolist())
        return None


def _check(key: bytes, keys_values: Tensor) -> int:
    return zlib.crc32(keys_values.contiguous().view(-1).view(torch.uint8).numpy(), zlib.crc32(key))

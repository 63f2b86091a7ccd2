"""Image files into a store (store.py): those that are not there yet, decoded beside the model's work."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from htc_megatron.config import ConfigError
from htc_megatron.data.images import BadImage, open_image
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.processing_htc_vlm import HTCVLMImageProcessor
from htc_megatron.inference.store import ImageStore, file_key

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Counts(NamedTuple):
    """Images that were compressed, that were there already, and that could not be used."""

    compressed: int
    there: int
    bad: int


def image_files(given: Iterable[str | Path]) -> list[Path]:
    """Files, and the image files under folders, in order of their names. Raises ConfigError where a path does not exist."""
    files = []
    for path in map(Path, given):
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"image {path} does not exist")
    if not files:
        raise ConfigError("no image was found; wanted files, or folders that hold some")
    return files


def read_image(path: str | Path) -> Image.Image:
    """An image file, decoded. Raises ConfigError where it cannot be."""
    try:
        return open_image(Path(path).read_bytes())
    except (OSError, BadImage) as error:
        raise ConfigError(f"picture {path}: {error}") from None


def compress_into(
    store: ImageStore,
    model: HTCVLMForConditionalGeneration,
    image_processor: HTCVLMImageProcessor,
    images: Iterable[Path | bytes],
    batch_size: int = 16,
    shard_bytes: int = 256 << 20,
    shard_seconds: float = 600,
    say: Callable[[str], None] = lambda sentence: None,
) -> Counts:
    """Compress images, files or their bytes, that are not in the store; what cannot be decoded is said and left out.

    A file is written when it holds `shard_bytes`, after `shard_seconds`, and at the end, whatever ends it.
    """
    counts = {"there": 0, "bad": 0, "compressed": 0}
    seen: set[bytes] = set()
    keys: list[bytes] = []
    parts: list[Tensor] = []
    began = time.monotonic()

    def fresh() -> Iterator[tuple[bytes, str, bytes]]:
        for image in images:
            name = f"an image of {len(image)} bytes" if isinstance(image, bytes) else str(image)
            try:
                data = image if isinstance(image, bytes) else image.read_bytes()
            except OSError as error:
                counts["bad"] += 1
                say(f"{name} is left out: {error.strerror}")
                continue
            key = file_key(data)
            if key in seen or key in store:
                counts["there"] += 1
                continue
            seen.add(key)
            yield key, name, data

    def pixels(data: bytes) -> BatchFeature:
        return image_processor.preprocess([open_image(data)])

    def write() -> None:
        if keys:
            store.write(keys, torch.cat(parts))
            counts["compressed"] += len(keys)
            keys.clear()
            parts.clear()

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        waiting = fresh()

        def submit() -> list[tuple[bytes, str, Future[BatchFeature]]]:
            return [(key, name, threads.submit(pixels, data)) for key, name, data in islice(waiting, batch_size)]

        following = submit()
        try:
            while following:
                batch, following = following, submit()
                ready = []
                for key, name, future in batch:
                    try:
                        ready.append((key, future.result()))
                    except BadImage as error:
                        counts["bad"] += 1
                        say(f"{name} is left out: {error}")
                if ready:
                    inputs = {name: torch.cat([made[name] for _, made in ready]).to(model.device) for name in ready[0][1]}
                    parts.append(model.compress_images(**inputs).cpu())
                    keys += [key for key, _ in ready]
                    size = sum(part.nbytes for part in parts)
                    say(f"{counts['compressed'] + len(keys)} images compressed, {counts['there']} were there")
                    if size >= shard_bytes or time.monotonic() - began > shard_seconds:
                        write()
                        began = time.monotonic()
        finally:
            write()
    return Counts(counts["compressed"], counts["there"], counts["bad"])

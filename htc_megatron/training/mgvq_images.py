"""The images an MGVQ is trained on: found once, decoded ahead of the step, in an order that depends on the seed alone."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from htc_megatron.config import ConfigError
from htc_megatron.data.images import BadImage, open_image
from htc_megatron.hf.modeling_mgvq import mgvq_crop

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
CACHE_BYTES = 2**31  # decoded images are kept in memory if all of them fit into this


def find_images(source: str | Path) -> list[Path]:
    """Every image under a folder, or the images a text file lists (one path a line, relative to the file); sorted.

    ConfigError if there is nothing to read.
    """
    if not str(source):
        raise ConfigError("images is empty; it must name a folder of images or a text file with one image path a line.")
    source = Path(source)
    if source.is_dir():
        paths = [path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES]
        wanted = f"a folder with images ({', '.join(sorted(SUFFIXES))})"
    elif source.is_file():
        try:
            lines = source.read_text().splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"images: {source} is neither a folder nor a text file with one image path a line.") from error
        paths = [source.parent / line.strip() for line in lines if line.strip()]
        if absent := [path for path in paths if not path.is_file()]:
            raise ConfigError(f"images: {len(absent)} of {len(paths)} paths listed in {source} do not exist, the first is {absent[0]}.")
        wanted = "a list with one image path a line"
    else:
        raise ConfigError(f"images: {source} does not exist; it must be a folder of images or a text file with one image path a line.")
    if not paths:
        raise ConfigError(f"images: {source} has no images; it must be {wanted}.")
    return sorted(paths)


class ImageStore:
    """Decoded crops [3, size, size] uint8 by index. A broken image is named in `quarantine` and replaced by the next one.

    ConfigError once more than `max_bad_share` of all images proved broken.
    """

    def __init__(self, paths: list[Path], size: int, quarantine: Path, max_bad_share: float):
        self.paths = paths
        self.size = size
        self.quarantine = quarantine
        self.max_bad = int(max_bad_share * len(paths))
        self.bad: dict[int, str] = {}
        self.lock = Lock()
        self.cache: dict[int, Tensor] | None = {} if len(paths) * 3 * size**2 <= CACHE_BYTES else None

    def __getitem__(self, index: int) -> Tensor:
        for step in range(len(self.paths)):
            at = (index + step) % len(self.paths)
            if self.cache is not None and at in self.cache:
                return self.cache[at]
            if at in self.bad:
                continue
            try:
                crop = mgvq_crop(open_image(self.paths[at].read_bytes()), self.size)
            except (BadImage, OSError) as error:
                self._quarantine(at, str(error))
                continue
            if self.cache is not None:
                self.cache[at] = crop
            return crop
        raise ConfigError(f"images: none of the {len(self.paths)} images can be decoded; {self.quarantine} names them.")

    def _quarantine(self, index: int, reason: str) -> None:
        with self.lock:
            self.bad[index] = reason
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            self.quarantine.write_text("".join(f"{self.paths[at]}\t{self.bad[at]}\n" for at in sorted(self.bad)))
            if len(self.bad) > self.max_bad:
                raise ConfigError(
                    f"images: {len(self.bad)} of {len(self.paths)} are broken, such as {self.paths[index]} ({reason}); "
                    f"max_bad_share allows {self.max_bad}. {self.quarantine} names them."
                )


class Batches:
    """Batch k of training, decoded one batch ahead by a pool of threads.

    The order is a pure function of (seed, epoch); an epoch's incomplete tail is dropped. So a resumed run sees what the
    uninterrupted one would have seen.
    """

    def __init__(self, store: ImageStore, indices: Tensor, batch_size: int, seed: int, num_workers: int):
        if batch_size > len(indices):
            raise ConfigError(f"batch_size is {batch_size}, but only {len(indices)} images are left for training; it must not exceed them.")
        self.store = store
        self.indices = indices
        self.batch_size = batch_size
        self.seed = seed
        self.pool = ThreadPoolExecutor(max_workers=max(1, num_workers))
        self.ahead: dict[int, list[Future]] = {}
        self.epoch, self.order = -1, indices

    def batch_indices(self, step: int) -> list[int]:
        epoch, at = divmod(step, len(self.indices) // self.batch_size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, self.indices[torch.randperm(len(self.indices), generator=generator)]
        return self.order[at * self.batch_size : (at + 1) * self.batch_size].tolist()

    def __getitem__(self, step: int) -> Tensor:
        """Batch of step `step`, counted from 0: [batch_size, 3, size, size] uint8."""
        for wanted in (step, step + 1):
            if wanted not in self.ahead:
                self.ahead[wanted] = [self.pool.submit(self.store.__getitem__, index) for index in self.batch_indices(wanted)]
        return torch.stack([future.result() for future in self.ahead.pop(step)])

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

"""Packed rows of samples to a MicroBatch: ids and labels with images expanded, the layout, pixels and codes."""

from collections.abc import Sequence

import numpy as np
import torch

from htc_megatron.config import ConfigError, ModelConfig
from htc_megatron.data.conversation import IMAGE_TOKEN_INDEX
from htc_megatron.data.dataset import PreparedData
from htc_megatron.data.feature_cache import FeatureCache
from htc_megatron.data.images import BadImage, blank_codes, blank_pixels, clip_pixels, open_image
from htc_megatron.data.shards import Shard
from htc_megatron.model.layout import ImageShape, MicroBatch, SequenceLayout, VisionFeatures

IGNORE_INDEX = -100


def expand_sample(
    ids: Sequence[int] | np.ndarray, supervised: Sequence[bool] | np.ndarray, shape: ImageShape, voco_token_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every IMAGE_TOKEN_INDEX becomes N zeros (V_hy) and K voco ids; nothing of an image is supervised.

    Returns ids [t] int64, labels [t] int64 (-100 where unsupervised) and image_starts [images] int64: the column of each V_hy.
    """
    ids, supervised = np.asarray(ids, dtype=np.int64), np.asarray(supervised, dtype=bool)
    images = np.flatnonzero(ids == IMAGE_TOKEN_INDEX)
    counts = np.ones(len(ids), dtype=np.int64)
    counts[images] = shape.length
    starts = (np.cumsum(counts) - counts)[images]
    expanded = np.repeat(ids, counts)
    labels = np.where(np.repeat(supervised, counts), expanded, IGNORE_INDEX)
    for start in starts.tolist():
        expanded[start : start + shape.num_visual] = 0
        expanded[start + shape.num_visual : start + shape.length] = voco_token_id
        labels[start : start + shape.length] = IGNORE_INDEX
    return expanded, labels, starts


class Collator:
    """Builds micro-batches of packed rows. Safe to call from several threads.

    needs_pixels: pixel_values and codes are built, each where its channel is used; else both are None.
    cache: where features of images may be known already; then features are built too, and pixels of the other images alone.
    tolerant: a sample with an image that cannot be decoded is told in MicroBatch.broken, its pixels blank. It must not be trained on
        as it is: the ranks that decode nothing do not know of it.
    """

    def __init__(
        self,
        data: PreparedData,
        model: ModelConfig,
        seq_length: int,
        needs_pixels: bool,
        cache: FeatureCache | None = None,
        tolerant: bool = False,
    ):
        self.data, self.model, self.seq_length, self.needs_pixels, self.cache = data, model, seq_length, needs_pixels, cache
        self.tolerant = tolerant
        self.shape = ImageShape.from_config(model)

    def __call__(self, rows: list[list[int]]) -> MicroBatch:
        """rows: sample indices of each packed row; an empty list is a row of padding. Raises ConfigError on damaged data."""
        input_ids = np.zeros((len(rows), self.seq_length), dtype=np.int64)
        labels = np.full((len(rows), self.seq_length), IGNORE_INDEX, dtype=np.int64)
        samples, images, sources, names = [], [], [], []
        for row, members in enumerate(rows):
            column = 0
            for sample in members:
                shard, number = self.data.locate(sample)
                expanded, targets, starts = expand_sample(*shard.tokens(number), self.shape, self.model.method.voco_token_id)
                numbers = shard.images_of(number)
                stop = column + len(expanded)
                if stop > self.seq_length or len(numbers) != len(starts):
                    raise ConfigError(
                        f"data shard {shard.path}: sample {shard.name(number)!r} is not what the index says: prepare the data again"
                    )
                input_ids[row, column:stop], labels[row, column:stop] = expanded, targets
                images += [(len(samples), column + start) for start in starts.tolist()]
                sources += [(shard, image) for image in numbers]
                samples.append((row, column, stop))
                names.append(f"sample {sample} ({shard.name(number)!r})")
                column = stop
        layout = SequenceLayout(len(rows), self.seq_length, _table(samples, 3), _table(images, 2), self.shape)
        batch = MicroBatch(torch.from_numpy(input_ids), torch.from_numpy(labels), layout)
        if self.needs_pixels:
            if self.model.has_tower and self.cache is not None:
                batch.features = _known_features(sources, self.cache)
                batch.pixel_values = read_pixels(batch.features.missing, self.model)
            elif self.model.has_tower:
                broken: dict[int, str] | None = {} if self.tolerant else None
                batch.pixel_values = read_pixels(sources, self.model, broken)
                batch.broken = [(images[i][0], f"{names[images[i][0]]}: {why}") for i, why in (broken or {}).items()]
            if self.model.has_mgvq:
                batch.codes = torch.from_numpy(self._codes(sources))
        return batch

    def _codes(self, sources: list[tuple[Shard, int]]) -> np.ndarray:
        if not sources:
            return blank_codes(self.model)
        return np.stack([shard.codes[image] for shard, image in sources])


def read_pixels(sources: list[tuple[Shard, int]], model: ModelConfig, broken: dict[int, str] | None = None) -> torch.Tensor:
    """Decoded and prepared images; one blank image for none. [images or 1, 3, side, side].

    broken: filled with why an image cannot be used, by its place; blank pixels stand for it. Without it damaged data raise ConfigError.
    """
    if not sources:
        return torch.from_numpy(blank_pixels(model))
    size = model.vision.image_size
    pixels = np.empty((len(sources), 3, size, size), dtype=np.float32)
    for place, (shard, image) in enumerate(sources):
        try:
            pixels[place] = clip_pixels(open_image(shard.image_bytes(image)), size)
        except BadImage as error:
            sentence = f"data shard {shard.path}: image {image}: {error}: prepare or copy the data again"
            if broken is None:
                raise ConfigError(sentence) from None
            broken[place], pixels[place] = sentence, 0.0
    return torch.from_numpy(pixels)


def _known_features(sources: list[tuple[Shard, int]], cache: FeatureCache) -> VisionFeatures:
    """What the cache has of some images, before any rank agrees with another."""
    if not sources:
        blank = torch.zeros(1, *cache.shape, dtype=cache.dtype)
        return VisionFeatures([], torch.ones(1, dtype=torch.bool), blank, torch.zeros(1, dtype=torch.int64), run_tower=False)
    numbers = {source: number for number, source in enumerate(dict.fromkeys(sources))}
    read = [cache.read(*source) for source in numbers]
    known = [features for features in read if features is not None]
    found = torch.tensor([features is not None for features in read])
    stacked = torch.stack(known) if known else torch.empty(0, *cache.shape, dtype=cache.dtype)
    image_of = torch.tensor([numbers[source] for source in sources])
    return VisionFeatures(list(numbers), found, stacked, image_of, run_tower=not bool(found.all()))


def _table(rows: list[tuple], columns: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(-1, columns)

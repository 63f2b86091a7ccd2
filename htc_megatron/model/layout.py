"""Where prefix, anchors, patches, voco and text stand in packed sequences: a few integers a sample.

A packed row holds several samples end to end and padding behind them. Inside a sample an image takes
`num_visual + num_voco` positions: V_hy (anchors and patches) and then its voco tokens. Everything else is text.
Every pipeline stage builds the same layout from the batch's own metadata; no mask ever travels between stages.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from htc_megatron.config import ModelConfig


@dataclass(frozen=True)
class ImageShape:
    """How many positions the parts of one image take, and at which offsets RoPE sees them."""

    num_anchors: int
    num_patches: int
    num_voco: int
    fusion: str = "pre"

    @classmethod
    def from_config(cls, model: ModelConfig) -> "ImageShape":
        return cls(model.num_anchors, model.num_patches, model.method.num_voco_tokens, model.method.fusion)

    @property
    def num_visual(self) -> int:
        """N, the length of V_hy."""
        return self.num_anchors + self.num_patches

    @property
    def length(self) -> int:
        """Sequence positions of one image: N + K."""
        return self.num_visual + self.num_voco

    @property
    def span(self) -> int:
        """RoPE positions V_hy takes. With fusion `parallel` both channels run over the patches' positions."""
        return self.num_patches if self.fusion == "parallel" else self.num_visual

    def offsets(self) -> Tensor:
        """RoPE position of each of the N + K places, relative to the image's first. [N + K] int64."""
        if self.fusion == "parallel":
            anchors = torch.arange(self.num_anchors) * self.num_patches // max(self.num_anchors, 1)
            visual = torch.cat([anchors, torch.arange(self.num_patches)])
        else:
            visual = torch.arange(self.num_visual)
        return torch.cat([visual, self.span + torch.arange(self.num_voco)])


@dataclass(frozen=True)
class SequenceLayout:
    """Integers of one micro-batch of packed rows.

    samples: [num_samples, 3] int64, (row, start, stop) of each sample, in row order.
    images: [num_images, 2] int64, (sample, start): V_hy begins at `start` of the sample's row; in sequence order.
    """

    rows: int
    seq_length: int
    samples: Tensor
    images: Tensor
    image: ImageShape

    def __post_init__(self):
        samples, images = self.samples, self.images
        if samples.ndim != 2 or samples.shape[1] != 3 or images.ndim != 2 or images.shape[1] != 2:
            raise ValueError(f"layout: samples {tuple(samples.shape)} and images {tuple(images.shape)} must be [n, 3] and [m, 2]")
        if len(samples):
            row, start, stop = samples.T
            if row.min() < 0 or row.max() >= self.rows or start.min() < 0 or (stop <= start).any() or stop.max() > self.seq_length:
                raise ValueError(f"layout: a sample lies outside {self.rows} rows of {self.seq_length} tokens: {samples.tolist()}")
            here, there = samples[:-1], samples[1:]
            if ((there[:, 0] < here[:, 0]) | ((there[:, 0] == here[:, 0]) & (there[:, 1] < here[:, 2]))).any():
                raise ValueError(f"layout: samples overlap or are out of order: {samples.tolist()}")
        if len(images):
            sample, start = images.T
            if sample.min() < 0 or sample.max() >= len(samples):
                raise ValueError(f"layout: an image names sample {int(sample.max())} of {len(samples)}")
            inside = (start >= samples[sample, 1]) & (start + self.image.length <= samples[sample, 2])
            same = sample[1:] == sample[:-1]
            ordered = (sample[1:] > sample[:-1]) | (same & (start[1:] >= start[:-1] + self.image.length))
            if not inside.all() or not ordered.all():
                raise ValueError(f"layout: images overlap, are out of order or cross their sample's end: {images.tolist()}")

    @property
    def num_images(self) -> int:
        return len(self.images)

    @cached_property
    def image_places(self) -> Tensor:
        """Flat places (row * seq_length + column) of every image's V_hy and voco tokens. [num_images, N + K] int64."""
        first = self.samples[self.images[:, 0], 0] * self.seq_length + self.images[:, 1]
        return first[:, None] + torch.arange(self.image.length)

    @property
    def visual_places(self) -> Tensor:
        """Flat places of V_hy. [num_images, N] int64."""
        return self.image_places[:, : self.image.num_visual]

    @property
    def voco_places(self) -> Tensor:
        """Flat places of the voco tokens. [num_images, K] int64."""
        return self.image_places[:, self.image.num_visual :]

    @cached_property
    def position_ids(self) -> Tensor:
        """RoPE positions: every sample starts at 0, text goes on at the uncompressed position. [rows, seq_length] int64."""
        step = torch.ones(self.rows * self.seq_length, dtype=torch.int64)
        offsets = self.image.offsets()
        jumps = torch.diff(offsets, prepend=torch.tensor([0]))
        if self.num_images and self.image.length:
            step[self.image_places[:, 1:].reshape(-1)] = jumps[1:].repeat(self.num_images)
            after = self.image_places[:, -1] + 1  # the token behind the last voco stands one further
            after = after[after < len(step)]
            step[after] = self.image.span + self.image.num_voco - int(offsets[-1])
        places = torch.zeros_like(step)
        for row, start, stop in self.samples.tolist():
            a, b = row * self.seq_length + start, row * self.seq_length + stop
            places[a + 1 : b] = step[a + 1 : b].cumsum(0)
        return places.view(self.rows, self.seq_length)


@dataclass
class VisionFeatures:
    """The vision tower's features of a micro-batch's images where they are kept on disk: some are known, the others computed.

    sources: the micro-batch's distinct images, in the order in which they first come: (shard, number), what the cache calls them.
    found: [distinct] bool: whose features are known; pixel_values holds the others' pixels alone, in this order.
    known: [found, patches, h], in the tower's precision.
    image_of: [num_images] int64: the distinct image that each of the layout's images is.
    run_tower: whether the tower runs on this micro-batch: alike on all ranks whose towers communicate, needed here or not.
    computed: [not found, patches, h], left here by the front-end.

    A micro-batch without an image has a blank one, without a source, whose features are known to be zeros.
    """

    sources: list[tuple[Any, int]]
    found: Tensor
    known: Tensor
    image_of: Tensor
    run_tower: bool = True
    computed: Tensor | None = None

    @property
    def missing(self) -> list[tuple[Any, int]]:
        """Distinct images that the tower has to see."""
        return [source for source, found in zip(self.sources, self.found.tolist(), strict=False) if not found]

    def whole(self, device: torch.device) -> Tensor:
        """Features of all images, known and computed, as the tower itself would give them: [patches, images, h]."""
        known = self.known.to(device)
        distinct = known.new_empty(len(self.found), *known.shape[1:])
        found = self.found.to(device)
        distinct[found] = known
        if self.missing:
            distinct[~found] = self.computed
        return distinct[self.image_of.to(device)].transpose(0, 1).contiguous()


@dataclass
class MicroBatch:
    """One packed micro-batch as every rank of a model-parallel group sees it.

    input_ids: [rows, seq_length] int64; 0 at V_hy and padding, the voco id at voco tokens.
    labels: [rows, seq_length] int64, aligned with input_ids (not shifted); -100 where there is no loss.
    pixel_values: [num_images, 3, side, side] float32, CLIP-normalised; None where the front-end does not live.
    features: features of the images that are known already, pixel_values then being the others'; None without a cache.
    codes: [num_images, positions, groups] int16 MGVQ codes; None likewise.
    broken: samples of the layout with an image that cannot be used, and why. Known only to ranks that decode.
    """

    input_ids: Tensor
    labels: Tensor
    layout: SequenceLayout
    pixel_values: Tensor | None = None
    codes: Tensor | None = None
    features: VisionFeatures | None = None
    broken: list[tuple[int, str]] = field(default_factory=list)

    @property
    def num_tower_images(self) -> int:
        """Images that the vision tower has to see."""
        return self.layout.num_images if self.features is None else len(self.features.missing)

    @property
    def num_supervised(self) -> int:
        """Tokens that carry loss. The first token of a sample never does: nothing predicts it."""
        return int((self.labels != -100).sum())

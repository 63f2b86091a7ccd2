"""Floating-point operations of a training step, vision included, and the peak they are compared with (MFU).

Counted is what the method needs, not what an implementation spends: attention under the mask's own number of pairs, no query
of a V_hy token that sees only itself, of the last layer only what is read, logits at supervised tokens only, no padding, no
recomputation, the vision tower on images only whose features are not known already (model/operations.py has the formulas).
"""

import time

import torch

from htc_megatron.config import RunConfig
from htc_megatron.model.layout import MicroBatch
from htc_megatron.model.mask import MaskRule
from htc_megatron.model.operations import (
    adapter_operations,
    backward_factors,
    frontend_operations,
    layers_operations,
    output_operations,
    sample_pairs,
    tower_operations,
)

# Dense bf16 (or fp32 where noted) peak of one device in FLOP/s, from the vendors' data sheets.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40": 181e12, "V100": 125e12}


def attention_pairs(batch: MicroBatch, rule: MaskRule) -> tuple[int, int]:
    """Query-key pairs the mask allows in a micro-batch, all samples together: of text rows, and of images' rows."""
    layout = batch.layout
    starts_of: dict[int, list[int]] = {}
    for sample, start in layout.images.tolist():
        starts_of.setdefault(sample, []).append(start)
    found = [(0, 0)] + [
        sample_pairs(stop - first, [start - first for start in starts_of.get(index, [])], layout.image, rule)
        for index, (_, first, stop) in enumerate(layout.samples.tolist())
    ]
    text, images = (sum(pairs) for pairs in zip(*found, strict=True))
    return text, images


def last_layer_reads_images(batch: MicroBatch, rule: MaskRule) -> bool:
    """Whether text sees V_hy, or a supervised token stands right behind an image and its voco token predicts it."""
    layout = batch.layout
    if rule.mask == "none":
        return True
    for sample, start in layout.images.tolist():
        row, _, stop = layout.samples[sample].tolist()
        behind = start + layout.image.length
        if behind < stop and batch.labels[row, behind] != -100:
            return True
    return False


def backbone_operations(config: RunConfig, batch: MicroBatch) -> float:
    """Forward of the layers and the output layer over a micro-batch."""
    bb, rule, layout = config.model.backbone, MaskRule.from_config(config.model.method), batch.layout
    tokens = int((layout.samples[:, 2] - layout.samples[:, 1]).sum())
    visual = layout.num_images * layout.image.num_visual
    work = (tokens, visual, batch.num_supervised, attention_pairs(batch, rule), last_layer_reads_images(batch, rule))
    layer, before_last, last = layers_operations(bb, rule, *work)
    layers = (bb.num_layers - 2) * layer + before_last if bb.num_layers > 1 else 0
    return layers + last + output_operations(bb, batch.num_supervised)


def step_flops(config: RunConfig, batches: list[MicroBatch]) -> float:
    """Operations of forward and backward for some micro-batches.

    A trained part costs three times its forward, one that only passes gradients on twice, one behind which nothing is trained once.
    Adapters are trained, and the frozen backbone between them passes gradients on.
    """
    model = config.model
    tokens = sum(int((b.layout.samples[:, 2] - b.layout.samples[:, 1]).sum()) for b in batches)
    images = sum(b.layout.num_images for b in batches)
    parts = frontend_operations(model, images) | {"adapters": adapter_operations(model, tokens)}
    if "vision" in parts:
        parts["vision"] = tower_operations(model.vision, sum(b.num_tower_images for b in batches))
    parts["backbone"] = sum(backbone_operations(config, b) for b in batches)
    backward = backward_factors(model, config.training.freeze)
    return sum(operations * (1 + backward[part]) for part, operations in parts.items())


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s one rank could reach: the data sheet's on a known GPU, otherwise a matrix product timed here and now.

    All ranks time at once, so that ranks which share a machine share its peak.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if known in name:
                return peak
    size = 512 if device.type == "cpu" else 4096
    generator = torch.Generator(device).manual_seed(0)  # its own: the run's random state may have just been restored
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best

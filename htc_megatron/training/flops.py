"""Floating-point operations of a training step, vision included, and the peak they are compared with (MFU).

Counted is what the method needs, not what an implementation spends: attention under the mask's own number of pairs,
logits at supervised tokens only, no padding, no recomputation, the vision tower on images only whose features are not known
already. A multiply-add is two operations.
"""

import math
import time

import torch

from htc_megatron.config import RunConfig
from htc_megatron.model.layout import MicroBatch
from htc_megatron.model.mask import MaskRule
from htc_megatron.weights.table import is_adapter, weights

# Dense bf16 (or fp32 where noted) peak of one device in FLOP/s, from the vendors' data sheets.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40": 181e12, "V100": 125e12}


def attention_pairs(batch: MicroBatch, rule: MaskRule) -> int:
    """Query-key pairs the mask allows in a micro-batch, all samples together."""
    shape, layout = batch.layout.image, batch.layout
    visual, voco = shape.num_visual, shape.num_voco
    images_of: dict[int, list[int]] = {}
    for sample, start in layout.images.tolist():
        images_of.setdefault(sample, []).append(start)

    def triangle(n: int) -> int:
        return n * (n + 1) // 2

    pairs = 0
    for index, (_, first, stop) in enumerate(layout.samples.tolist()):
        length, starts = stop - first, images_of.get(index, [])
        if rule.mask == "none" and rule.image_sees == "prefix":
            pairs += triangle(length)
            continue
        inside = triangle(visual) if rule.mask in ("full", "none") else visual
        own = inside + voco * visual + triangle(voco)
        language = length - len(starts) * visual  # text and voco tokens, in the order the text sees them
        before = [start - first - i * visual for i, start in enumerate(starts)]  # language tokens in front of each image
        if rule.mask == "none":
            text = triangle(length) - sum(_range_sum(s - first, shape.length) for s in starts)
        else:
            hidden = before[0] if rule.text_sees == "voco_on" and starts else 0
            text = triangle(language) - hidden * (language - hidden) - sum(_range_sum(b - hidden, voco) for b in before)
        prefix = sum(b * shape.length for b in before) if rule.image_sees == "prefix" else 0
        pairs += text + len(starts) * own + prefix
    return pairs


def _range_sum(start: int, count: int) -> int:
    """Pairs that `count` causal rows behind `start` keys would have: they are counted with their image instead."""
    return count * start + count * (count + 1) // 2


def step_flops(config: RunConfig, batches: list[MicroBatch]) -> float:
    """Operations of forward and backward for some micro-batches.

    A trained part costs three times its forward, one that only passes gradients on twice, one behind which nothing is trained once.
    Adapters are trained, and the frozen backbone between them passes gradients on.
    """
    model, frozen = config.model, set(config.training.freeze)
    bb, vision, method = model.backbone, model.vision, model.method
    head_dim = bb.hidden_size // bb.num_attention_heads
    per_layer = bb.hidden_size * (2 * bb.hidden_size + 2 * bb.num_query_groups * head_dim + 3 * bb.ffn_hidden_size)
    rule = MaskRule.from_config(method)
    tokens = sum(int((b.layout.samples[:, 2] - b.layout.samples[:, 1]).sum()) for b in batches)
    images = sum(b.layout.num_images for b in batches)
    supervised = sum(b.num_supervised for b in batches)
    pairs = sum(attention_pairs(b, rule) for b in batches)

    trunk = bb.num_layers * (2 * per_layer * tokens + 4 * bb.hidden_size * pairs) + 2 * bb.hidden_size * bb.vocab_size * supervised
    tower = projector = anchors = 0.0
    if method.channels != "discrete":
        seen = vision.num_patches + 1
        layer = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.ffn_hidden_size)
        patchify = 3 * vision.patch_size**2 * vision.hidden_size * vision.num_patches
        tower = sum(b.num_tower_images for b in batches) * (
            vision.num_layers * (2 * layer * seen + 4 * vision.hidden_size * seen**2) + 2 * patchify
        )
        widths = vision.hidden_size * bb.hidden_size + (bb.hidden_size**2 if method.projector == "mlp2x_gelu" else 0)
        projector = 2.0 * images * vision.num_patches * widths
    if method.channels != "continuous":
        widths = model.mgvq.flat_size * method.anchor_hidden_size + method.anchor_hidden_size * method.num_anchors * bb.hidden_size
        anchors = 2.0 * images * widths

    def cost(part: str, behind: bool) -> int:
        return 3 if part not in frozen else 2 if behind else 1

    behind = {"vision", "projector", "anchors", "voco"} - frozen
    adapters = sum(math.prod(weight.shape) for weight in weights(model) if is_adapter(weight.name)) if model.lora.rank else 0
    return (
        trunk * cost("backbone", bool(behind or adapters))
        + 3 * 2 * adapters * tokens
        + projector * cost("projector", "vision" not in frozen)
        + tower * cost("vision", False)
        + anchors * cost("anchors", False)
    )


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

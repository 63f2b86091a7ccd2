"""Where the voco row looks: its attention over an image's anchors and patches, per layer and head, as numbers and as a picture.

The paper reports that the largest weights fall on the anchors; `anchor_share` against `uniform_share` is that claim in numbers.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from htc_megatron.config import ConfigError
from htc_megatron.hf.configuration_htc_vlm import HTCVLMConfig
from htc_megatron.hf.mask_htc_vlm import VOCO
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.processing_htc_vlm import HTCVLMProcessor, open_image
from htc_megatron.inference.answer import beginning


@dataclass(frozen=True)
class VocoAttention:
    """Attention of the voco rows, mean over K rows and over the images given.

    anchor_weights: [layers][heads][anchors]; patch_weights: [layers][patches], mean over heads, row by row of the image.
    anchor_share: [layers], the part of all attention to V_hy that falls on the anchors; anchor_share_by_head: [layers][heads].
    visual_share: [layers], the part of all attention that falls on V_hy. uniform_share: anchors / (anchors + patches).
    """

    num_images: int
    anchor_weights: list[list[list[float]]]
    patch_weights: list[list[float]]
    anchor_share: list[float]
    anchor_share_by_head: list[list[float]]
    visual_share: list[float]
    uniform_share: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def voco_attention(model: HTCVLMForConditionalGeneration, processor: HTCVLMProcessor, images: Iterable[Any]) -> VocoAttention:
    """Attention over each of `images`, taken one at a time, behind the chat template's beginning.

    Raises ConfigError where there is nothing to see.
    """
    config = model.config
    if not config.num_voco_tokens:
        raise ConfigError("the model has no voco tokens (num_voco_tokens 0), so there is no attention of theirs to draw")
    ids = torch.tensor([beginning(processor)], device=model.device)
    before = config._attn_implementation
    model.set_attn_implementation("eager")  # fused kernels do not tell their weights
    count, total = 0, torch.zeros(())
    try:
        for image in images:
            count, total = count + 1, total + _rows(model, ids, processor.image_processor.preprocess([image]))
    finally:
        model.set_attn_implementation(before)
    if not count:
        raise ConfigError("no image was given; wanted at least one")
    weights = total / count  # [layers, heads, N]
    anchors, patches = split_visual(config, weights)
    share = anchors.sum(-1) / weights.sum(-1)
    return VocoAttention(
        num_images=count,
        anchor_weights=anchors.tolist(),
        patch_weights=patches.mean(1).tolist(),
        anchor_share=(anchors.sum((1, 2)) / weights.sum((1, 2))).tolist(),
        anchor_share_by_head=share.tolist(),
        visual_share=weights.sum(-1).mean(1).tolist(),
        uniform_share=config.anchors_per_image / config.visual_per_image,
    )


def _rows(model: HTCVLMForConditionalGeneration, ids: Tensor, pixels: dict[str, Tensor]) -> Tensor:
    """Weights of one image's V_hy in the voco rows, mean over the rows. [layers, heads, N] float64."""
    inputs = {name: value.to(model.device) for name, value in pixels.items()}
    outputs = model.model(ids, output_attentions=True, **inputs)
    tokens = outputs.expansion.tokens
    voco = (tokens.kind[0] == VOCO).nonzero()[:, 0]
    columns = outputs.expansion.visual[1][0]
    return torch.stack([layer[0][:, voco][:, :, columns].double().mean(1).cpu() for layer in outputs.attentions])


def split_visual(config: HTCVLMConfig, visual: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """What there is one of for each of V_hy's N along `dim`, as that of the anchors and that of the patches."""
    sizes = (config.anchors_per_image, config.patches_per_image)
    if config.fusion == "post":
        patches, anchors = visual.split(sizes[::-1], dim=dim)
    else:
        anchors, patches = visual.split(sizes, dim=dim)
    return anchors, patches


def draw(attention: VocoAttention, image: Any, path: str | Path) -> None:
    """PNG: the image and the patches' weights over it, the anchors' share per layer, and per layer and head.

    Raises ConfigError where matplotlib, which only drawing needs, is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ConfigError("drawing needs matplotlib, which is not installed: pip install -e '.[examples]' brings it") from None

    shares = np.array(attention.anchor_share_by_head)
    layers, heads = shares.shape
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    pictures = figure.subplots(1, 4)
    picture = open_image(image)
    side = max(picture.size)
    left, top = (side - picture.width) / 2, (side - picture.height) / 2
    extent = (-left, side - left, side - top, -top)  # of the square that the tower sees, in the picture's pixels
    for axis, title in zip(pictures[:2], ("image", "attention on patches"), strict=True):
        axis.imshow(picture)
        axis.set(title=title, xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:])
    patches = np.array(attention.patch_weights)
    if patches.size:
        side_tokens = math.isqrt(patches.shape[1])  # a resampler's tokens, which are of no place, lie in one row
        grid = (side_tokens, side_tokens) if side_tokens**2 == patches.shape[1] else (1, patches.shape[1])
        shown = pictures[1].imshow(patches.mean(0).reshape(grid), extent=extent, cmap="magma", alpha=0.75)
        figure.colorbar(shown, ax=pictures[1], shrink=0.8)
    pictures[2].bar(range(layers), attention.anchor_share, color="tab:blue", label="anchors")
    pictures[2].axhline(attention.uniform_share, color="tab:red", linestyle="--", label="uniform")
    pictures[2].set(title="attention on anchors, by layer", xlabel="layer", ylim=(0, 1))
    pictures[2].legend()
    shown = pictures[3].imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    pictures[3].set(title="attention on anchors, by head", xlabel="head", ylabel="layer")
    for axis in (pictures[2].xaxis, pictures[3].xaxis, pictures[3].yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(shown, ax=pictures[3], shrink=0.8)
    figure.savefig(path, dpi=120, format="png")

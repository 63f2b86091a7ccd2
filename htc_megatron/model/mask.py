"""The disentanglement mask M_hy (paper, section on the attention mask), as a rule and as the dense mask it spells out.

The dense mask is the reference: training reaches the same result by the exact split in `attention.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from htc_megatron.config import MethodConfig
from htc_megatron.model.layout import SequenceLayout

PADDING, TEXT, VISUAL, VOCO = 0, 1, 2, 3


@dataclass(frozen=True)
class MaskRule:
    """mask: star (V_hy tokens see only themselves) | full (causal inside an image) | none (no compression).

    image_sees: own | prefix (what stands before the image, too; other images' V_hy only with mask none).
    text_sees: all | voco_on (from the first voco on, nothing before it: VoCo-LLaMA's rule).
    """

    mask: str = "star"
    image_sees: str = "own"
    text_sees: str = "all"

    @classmethod
    def from_config(cls, method: MethodConfig) -> "MaskRule":
        return cls(method.mask, method.image_sees, method.text_sees)


def token_kinds(layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kind, sample, image and first voco column of every place; each [rows, seq_length] int64 (-1: none)."""
    shape = layout.rows * layout.seq_length
    kind = torch.full((shape,), PADDING)
    sample, image = torch.full((shape,), -1), torch.full((shape,), -1)
    first_voco = torch.full((shape,), layout.seq_length)
    for index, (row, start, stop) in enumerate(layout.samples.tolist()):
        places = slice(row * layout.seq_length + start, row * layout.seq_length + stop)
        kind[places], sample[places] = TEXT, index
    if layout.num_images:
        kind[layout.visual_places] = VISUAL
        kind[layout.voco_places] = VOCO
        image[layout.image_places] = torch.arange(layout.num_images)[:, None]
    if layout.num_images and layout.image.num_voco:
        for index, place in zip(layout.images[:, 0].flip(0).tolist(), layout.voco_places[:, 0].flip(0).tolist(), strict=True):
            first_voco[sample == index] = place % layout.seq_length  # flipped: the sample's first image has the last word
    view = (layout.rows, layout.seq_length)
    return kind.view(view), sample.view(view), image.view(view), first_voco.view(view)


def dense_mask(layout: SequenceLayout, rule: MaskRule) -> Tensor:
    """True where a query (dim 1) may attend to a key (dim 2). [rows, seq_length, seq_length] bool.

    Padding sees itself, so that no softmax is empty.
    """
    kind, sample, image, first_voco = token_kinds(layout)
    column = torch.arange(layout.seq_length)
    q, k = column[None, :, None], column[None, None, :]
    kind_q, kind_k = kind[:, :, None], kind[:, None, :]
    same_image = image[:, :, None] == image[:, None, :]
    f = first_voco[:, :, None]

    key_is_language = (kind_k == TEXT) | (kind_k == VOCO)
    uncompressed = rule.mask == "none"
    before_image = rule.image_sees == "prefix"

    text = key_is_language & ((rule.text_sees == "all") | (q < f) | (k >= f)) | (kind_k == VISUAL) & uncompressed
    inside = (kind_k == VISUAL) & same_image & (rule.mask in ("full", "none"))
    across = key_is_language & ~same_image & before_image | (kind_k == VISUAL) & ~same_image & (uncompressed and before_image)
    visual = inside | across
    voco = same_image | across

    allowed = torch.where(kind_q == TEXT, text, torch.where(kind_q == VISUAL, visual, voco))
    allowed &= (sample[:, :, None] == sample[:, None, :]) & (kind_q != PADDING) & (kind_k != PADDING) & (k <= q)
    return allowed | (q == k)

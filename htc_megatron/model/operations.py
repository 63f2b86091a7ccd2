"""Floating-point operations of the model's parts: of a forward pass over given work, and how many times as many backward takes.

Formulas alone, without a tensor: training/flops.py counts real batches with them, model/stages.py an assumed sample. A
multiply-add is two operations.
"""

import math
from collections.abc import Sequence

from htc_megatron.config import BackboneConfig, ModelConfig, VisionConfig
from htc_megatron.model.layout import ImageShape
from htc_megatron.model.mask import MaskRule
from htc_megatron.weights.table import is_adapter, weights


def sample_pairs(length: int, starts: Sequence[int], shape: ImageShape, rule: MaskRule) -> tuple[int, int]:
    """Query-key pairs the mask allows in one sample, of text rows and of images' rows (V_hy and voco tokens).

    length: of the sample; starts: where its images' V_hy begin, counted from its own first token.
    """
    visual, voco = shape.num_visual, shape.num_voco

    def triangle(n: int) -> int:
        return n * (n + 1) // 2

    def rows(start: int, count: int) -> int:  # pairs that `count` causal rows behind `start` keys have
        return count * start + triangle(count)

    before = [start - i * visual for i, start in enumerate(starts)]  # language tokens in front of each image
    if rule.mask == "none":
        text = triangle(length) - sum(rows(start, shape.length) for start in starts)
        if rule.image_sees == "prefix":
            return text, sum(rows(start, shape.length) for start in starts)
    else:
        language = length - len(starts) * visual  # text and voco tokens, in the order the text sees them
        hidden = before[0] if rule.text_sees == "voco_on" and starts else 0
        text = triangle(language) - hidden * (language - hidden) - sum(rows(b - hidden, voco) for b in before)
    inside = triangle(visual) if rule.mask in ("full", "none") else visual
    own = inside + voco * visual + triangle(voco)
    prefix = sum(b * shape.length for b in before) if rule.image_sees == "prefix" else 0
    return text, len(starts) * own + prefix


def layer_operations(bb: BackboneConfig, queries: float, keys: float, outputs: float, pairs: float) -> float:
    """One decoder layer. queries, keys: rows that have a query, and a key and a value; outputs: rows that go on behind attention."""
    head_dim = bb.hidden_size // bb.num_attention_heads
    widths = queries * bb.hidden_size + keys * 2 * bb.num_query_groups * head_dim + outputs * (bb.hidden_size + 3 * bb.ffn_hidden_size)
    return 2 * bb.hidden_size * widths + 4 * bb.hidden_size * pairs


def layers_operations(
    bb: BackboneConfig, rule: MaskRule, tokens: float, visual: float, supervised: float, pairs: tuple[float, float], read: bool
) -> tuple[float, float, float]:
    """Any layer, the one before the last, and the last, of which only what is read is computed (model/decoder.py).

    tokens: all rows; visual: those of V_hy among them; pairs: of text rows and of images' rows. read: whether the last layer needs
    V_hy, because text sees it or a voco token's output is read.
    """
    alone = rule.mask == "star" and rule.image_sees == "own"  # V_hy tokens see only themselves and need no query
    asking = tokens - visual * alone
    seen = tokens if read else tokens - visual
    layer = layer_operations(bb, asking, tokens, tokens, sum(pairs))
    before_last = layer_operations(bb, asking, tokens, seen, sum(pairs))
    last = layer_operations(bb, min(seen, asking), seen, supervised, sum(pairs) if read else pairs[0])
    return layer, before_last, last


def output_operations(bb: BackboneConfig, rows: float) -> float:
    """The output layer at the rows that carry loss."""
    return 2 * bb.hidden_size * bb.vocab_size * rows


def tower_operations(vision: VisionConfig, images: float) -> float:
    """The CLIP tower."""
    seen = vision.num_patches + 1
    layer = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.ffn_hidden_size)
    patchify = 3 * vision.patch_size**2 * vision.hidden_size * vision.num_patches
    return images * (vision.num_layers * (2 * layer * seen + 4 * vision.hidden_size * seen**2) + 2 * patchify)


def frontend_operations(model: ModelConfig, images: float) -> dict[str, float]:
    """The parts that come before the backbone, by the names `training.freeze` has for them; those this model has."""
    found, method, hidden = {}, model.method, model.backbone.hidden_size
    if model.has_tower:
        found["vision"] = tower_operations(model.vision, images)
        widths = model.vision.hidden_size * hidden + (hidden**2 if method.projector == "mlp2x_gelu" else 0)
        projected = model.num_patches if model.has_qformer else model.vision.num_patches
        found["projector"] = 2.0 * images * projected * widths
    if model.has_qformer:
        found["resampler"] = qformer_operations(model, images)
    if model.num_anchors:
        widths = model.anchor_inputs * method.anchor_hidden_size + method.anchor_hidden_size * method.num_anchors * hidden
        found["anchors"] = 2.0 * images * widths
    return found


def qformer_operations(model: ModelConfig, images: float) -> float:
    """The Q-Former."""
    width, queries, features = model.vision.hidden_size, model.method.num_resampled_tokens, model.vision.num_patches
    of_queries = 6 * width**2 + 2 * width * model.vision.ffn_hidden_size  # all linears but the keys and values of the features
    linears = queries * of_queries + features * 2 * width**2
    return images * model.method.resampler_layers * (2 * linears + 4 * width * queries * (queries + features))


def adapter_operations(model: ModelConfig, rows: float) -> float:
    """All LoRA adapters of the backbone at `rows` tokens."""
    if not model.lora.rank:
        return 0.0
    return 2.0 * rows * sum(math.prod(weight.shape) for weight in weights(model) if is_adapter(weight.name))


def backward_factors(model: ModelConfig, freeze: Sequence[str]) -> dict[str, int]:
    """Backward's operations for each one of forward, by part; `adapters` are those of LoRA.

    2 where weights and inputs get gradients, 1 where gradients are only passed on to something trained behind, else 0. The
    tower, and anchors of MGVQ's codes, pass none on to what comes before them; they are counted as 2 all the same, as usual.
    """
    frozen = set(freeze)
    queries = {"resampler"} if model.has_qformer else set()
    behind = ({"vision", "projector", "anchors", "voco"} | queries) - frozen

    def factor(part: str, passes_on: bool) -> int:
        return 2 if part not in frozen else int(passes_on)

    return {
        "backbone": factor("backbone", bool(behind or model.lora.rank)),
        "projector": factor("projector", bool((queries | {"vision"}) - frozen)),
        "resampler": factor("resampler", "vision" not in frozen),
        "vision": factor("vision", False),
        "anchors": factor("anchors", model.has_tower and not model.has_mgvq and "vision" not in frozen),
        "adapters": 2,
    }

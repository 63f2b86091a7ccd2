"""The exported model's mask and positions against the rule in plain Python, and against training's own."""

import itertools
import random

import pytest
import torch

from htc_megatron.hf.mask_htc_vlm import PADDING, TEXT, VISUAL, VOCO, allowed, expand
from htc_megatron.model.layout import ImageShape, SequenceLayout
from htc_megatron.model.mask import MaskRule, dense_mask
from tests.hf_tiny import tiny_batch, tiny_config

RULES = [
    (mask, image_sees, text_sees)
    for mask, image_sees, text_sees in itertools.product(("star", "full", "none"), ("own", "prefix"), ("all", "voco_on"))
    if (mask, text_sees) != ("none", "voco_on")
]
ROWS = [[1, 5, "image", 6, 7, "image", "image", 8], ["image", 9], [1, 4, 5], [3, "image"]]


def spelled_out(config, row):
    """A row of ids and "image" as [(kind, image in the row, RoPE position)], written down one by one."""
    anchors, patches, voco = config.anchors_per_image, config.patches_per_image, config.num_voco_tokens
    tokens, position, image = [], 0, -1
    for item in row:
        if item != "image":
            tokens.append((TEXT, -1, position))
            position += 1
            continue
        image += 1
        parallel = config.fusion == "parallel"
        first = [position + a * patches // anchors if parallel else position + a for a in range(anchors)]
        if config.fusion == "post":
            places = [position + p for p in range(patches)] + [position + patches + a for a in range(anchors)]
        else:
            places = first + [position + p + (0 if parallel else anchors) for p in range(patches)]
        tokens += [(VISUAL, image, place) for place in places]
        position += patches if parallel else anchors + patches
        for _ in range(voco):
            tokens.append((VOCO, image, position))
            position += 1
    return tokens


def may_see(config, tokens, q, k):
    """The rule for one pair of tokens of one sample."""
    if k > q:
        return False
    if k == q:
        return True
    (q_kind, q_image, _), (k_kind, k_image, _) = tokens[q], tokens[k]
    first = next((i for i, token in enumerate(tokens) if token[0] == VOCO), None)
    none, prefix = config.mask == "none", config.image_sees == "prefix"
    if q_kind == TEXT:
        if k_kind == VISUAL:
            return none
        return config.text_sees == "all" or first is None or q < first or k >= first
    if k_kind == VISUAL and k_image == q_image:
        return q_kind == VOCO or config.mask in ("full", "none")
    if k_kind == VISUAL:
        return none and prefix
    if k_image == q_image:  # a voco token of the same image: only voco tokens stand behind it
        return True
    return prefix


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("voco", [1, 2])
@pytest.mark.parametrize("fusion, channels", [("pre", "hybrid"), ("post", "hybrid"), ("parallel", "hybrid"), ("pre", "discrete")])
@pytest.mark.parametrize("mask, image_sees, text_sees", RULES)
def test_mask_and_positions_are_the_rule(mask, image_sees, text_sees, fusion, channels, voco, side):
    config = tiny_config(mask=mask, image_sees=image_sees, text_sees=text_sees, fusion=fusion, channels=channels, num_voco_tokens=voco)
    batch = tiny_batch(config, ROWS, side)
    tokens = expand(config, batch["input_ids"], batch["attention_mask"].bool()).tokens
    seen = allowed(config, tokens, tokens)
    for row, items in enumerate(ROWS):
        wanted = spelled_out(config, items)
        columns = (tokens.kind[row] != PADDING).nonzero()[:, 0]
        assert tokens.kind[row, columns].tolist() == [kind for kind, _, _ in wanted]
        assert tokens.data[3][row, columns].tolist() == [position for _, _, position in wanted]
        pairs = [[may_see(config, wanted, q, k) for k in range(len(wanted))] for q in range(len(wanted))]
        assert seen[row][columns][:, columns].tolist() == pairs
        others = (tokens.kind[row] == PADDING).nonzero()[:, 0]
        assert not seen[row][columns][:, others].any()


@pytest.mark.parametrize("mask, image_sees, text_sees", RULES)
@pytest.mark.parametrize("fusion", ["pre", "post", "parallel"])
def test_equals_training_layout(mask, image_sees, text_sees, fusion):
    """Random samples, packed in training's layout and one a row here: the same pairs and positions."""
    rng = random.Random(7)
    config = tiny_config(mask=mask, image_sees=image_sees, text_sees=text_sees, fusion=fusion, num_voco_tokens=2)
    shape = ImageShape(config.anchors_per_image, config.patches_per_image, 2, fusion)
    for _ in range(5):
        rows = [[rng.choice([5, 6, "image"]) for _ in range(rng.randrange(1, 6))] for _ in range(3)]
        starts, images, place = [], [], 0
        for number, row in enumerate(rows):
            start = place
            for item in row:
                if item == "image":
                    images.append((number, place))
                place += shape.length if item == "image" else 1
            starts.append((0, start, place))
        layout = SequenceLayout(1, place, torch.tensor(starts), torch.tensor(images, dtype=torch.int64).reshape(-1, 2), shape)
        packed = dense_mask(layout, MaskRule(mask, image_sees, text_sees))[0]
        batch = tiny_batch(config, rows, "right")
        tokens = expand(config, batch["input_ids"], batch["attention_mask"].bool()).tokens
        seen = allowed(config, tokens, tokens)
        for row, (_, start, stop) in enumerate(starts):
            length = stop - start
            assert torch.equal(seen[row, :length, :length], packed[start:stop, start:stop])
            assert torch.equal(tokens.position[row, :length], layout.position_ids[0, start:stop])


@pytest.mark.parametrize("mask", ["star", "none"])
def test_broken_placeholders_are_refused(mask):
    config = tiny_config(mask=mask, num_voco_tokens=2)
    run = [config.image_token_id] * config.image_seq_length
    ids = torch.tensor([[1, *run[:-1]]])
    with pytest.raises(ValueError, match=f"row 0 of input_ids has {len(run) - 1} image placeholders; wanted a multiple of {len(run)}"):
        expand(config, ids, torch.ones_like(ids, dtype=torch.bool))
    ids = torch.tensor([[1, *run[:-1], 5, run[-1]]])
    with pytest.raises(ValueError, match="side by side"):
        expand(config, ids, torch.ones_like(ids, dtype=torch.bool))


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(mask="stars"), "mask is 'stars'; it must be one of star, full, none"),
        (dict(mask="none", text_sees="voco_on"), "text_sees must be all"),
        (dict(num_voco_tokens=0), "at least 1, or 0 with mask none"),
        (dict(backbone="gpt2"), "llama or qwen2"),
    ],
)
def test_impossible_configurations_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_config(**wrong)

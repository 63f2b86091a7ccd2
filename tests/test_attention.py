"""Split attention against the dense mask it must equal.

fp32: 1e-6 absolute on outputs of order one, and in the root mean square on gradients (each sums over many rows, so its
largest entries round worse). float64: 1e-13, which leaves no room for a wrong term.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from htc_megatron.model.attention import dense_attention, split_attention
from htc_megatron.model.attention_plan import plan_attention
from htc_megatron.model.layout import ImageShape, SequenceLayout
from htc_megatron.model.mask import PADDING, MaskRule, dense_mask, token_kinds
from htc_megatron.model.rows import RowOrder

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
RULES = [
    MaskRule(mask, sees, text)
    for mask in ("star", "full", "none")
    for sees in ("own", "prefix")
    for text in ("all", "voco_on")
    if not (mask == "none" and text == "voco_on")
]


def build(rows: list[list[list[int]]], image: ImageShape, padding: int = 3) -> SequenceLayout:
    """Rows of samples; a sample is a list of text runs with an image between each two of them."""
    samples, images, longest = [], [], 0
    for row, row_samples in enumerate(rows):
        at = 0
        for runs in row_samples:
            start = at
            for index, run in enumerate(runs):
                if index:
                    images.append((len(samples), at))
                    at += image.length
                at += run
            samples.append((row, start, at))
        longest = max(longest, at)
    as_tensor = lambda values, width: torch.tensor(values, dtype=torch.int64).view(-1, width)  # noqa: E731
    return SequenceLayout(len(rows), longest + padding, as_tensor(samples, 3), as_tensor(images, 2), image)


def split_of_places(query, key, value, layout: SequenceLayout, rule: MaskRule, shares: int = 1) -> torch.Tensor:
    """Split attention of [s, b, heads, d] tensors: [s, b, heads * d], zeros at padding. shares: both zones are filled to multiples of."""
    order = RowOrder.of(layout, shares)
    plan = plan_attention(layout, rule, order)
    rows = [x.transpose(0, 1).flatten(0, 1)[order.places.clamp_min(0)] for x in (query, key, value)]
    query = rows[0][: order.language] if plan.own_image_only else rows[0]
    zones = [x.split([order.language, order.visual]) for x in rows[1:]]
    out = torch.cat(split_attention(query, *zones, plan, query.shape[-1] ** -0.5))
    if not plan.text_sees_images:
        text, nothing = split_attention(query[: order.language], *zones, plan, query.shape[-1] ** -0.5, images=False)
        assert nothing is None and torch.equal(text, out[: order.num_text])
    return order.at_places(out).unflatten(0, (layout.rows, layout.seq_length)).flatten(2).transpose(0, 1)


def compare(layout: SequenceLayout, rule: MaskRule, heads: int = 4, groups: int = 2, d: int = 8, seed: int = 0, shares: int = 1) -> None:
    for dtype in TOLERANCE:
        compare_in(dtype, layout, rule, heads, groups, d, seed, shares)


def compare_in(dtype: torch.dtype, layout: SequenceLayout, rule: MaskRule, heads: int, groups: int, d: int, seed: int, shares: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.seq_length, layout.rows)
    leaves = [torch.randn(*shape, n, d, generator=generator, dtype=dtype, requires_grad=True) for n in (heads, groups, groups)]
    weight = torch.randn(*shape, heads * d, generator=generator, dtype=dtype)
    split = split_of_places(*leaves, layout, rule, shares)
    split_grads = torch.autograd.grad((split * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
    dense = dense_attention(*(x.transpose(0, 1) for x in leaves), dense_mask(layout, rule), d**-0.5).flatten(2).transpose(0, 1)
    dense = dense * (token_kinds(layout)[0] != PADDING).T[..., None]  # nothing is computed at padding
    dense_grads = torch.autograd.grad((dense * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(split, dense, atol=TOLERANCE[dtype], rtol=0)
    for ours, theirs in zip(split_grads, dense_grads, strict=True):
        assert (ours - theirs).norm() <= TOLERANCE[dtype] * max(theirs.numel() ** 0.5, float(theirs.norm()))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("num_voco", [1, 2, 64])
def test_equals_dense(rule, num_voco):
    image = ImageShape(4, 9, num_voco)
    compare(build([[[3, 5], [7]], [[0, 4, 2, 1], [6]], [[2, 1]]], image), rule)  # several images, none, packed, no prefix


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shares", [2, 8])
def test_filling_changes_nothing(rule, shares):
    """As sequence parallelism fills both zones: 39 rows of images, so that there is filling behind them."""
    layout = build([[[3, 5], [7]], [[0, 4, 2], [6]]], ImageShape(4, 9, 1))
    order = RowOrder.of(layout, shares)
    assert order.visual > order.num_visual == 39
    compare(layout, rule, shares=shares)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_image_anywhere(rule):
    compare(build([[[4], [3]], [[9]]], ImageShape(4, 9, 1)), rule)


@pytest.mark.parametrize("sees", ["own", "prefix"])
def test_uncompressed_without_voco(sees):
    compare(build([[[3, 5], [2]]], ImageShape(0, 9, 0)), MaskRule("none", sees))


@pytest.mark.parametrize("num_voco", [1, 2])
def test_bf16_rounds_results_and_not_scores(num_voco):
    """Products of size 200 would be off by a half if bf16 rounded them; results and weights are, by 2^-8 of the largest value."""
    layout = build([[[3, 5]]], ImageShape(4, 60, num_voco))
    generator = torch.Generator().manual_seed(0)
    shape = (layout.seq_length, layout.rows, 4, 32)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).mul_(size).bfloat16() for size in (6, 6, 1)]
    split = split_of_places(*leaves, layout, MaskRule())
    precise = split_of_places(*(x.double() for x in leaves), layout, MaskRule())
    assert (split.double() - precise).abs().max() <= 2**-7 * precise.abs().max()


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(lambda runs: len(runs) > 1 or runs[0] > 0), max_size=4),
        min_size=1,
        max_size=3,
    ),
    anchors=st.integers(0, 3),
    patches=st.integers(1, 6),
    num_voco=st.integers(1, 3),
    fusion=st.sampled_from(["pre", "post"]),
    rule=st.sampled_from(RULES),
    padding=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_random_layouts(rows, anchors, patches, num_voco, fusion, rule, padding, seed):
    compare(build(rows, ImageShape(anchors, patches, num_voco, fusion), padding), rule, seed=seed)


def brute_force(layout: SequenceLayout, rule: MaskRule) -> torch.Tensor:
    """The rule in words, one pair at a time."""
    size, image = layout.seq_length, layout.image
    allowed = torch.eye(size, dtype=torch.bool).repeat(layout.rows, 1, 1)
    for index, (row, start, stop) in enumerate(layout.samples.tolist()):
        owner = {}
        for number, (sample, first) in enumerate(layout.images.tolist()):
            if sample == index:
                owner |= {first + i: (number, i < image.num_visual) for i in range(image.length)}
        vocos = [p for p, (_, visual) in owner.items() if not visual]
        f = min(vocos) if vocos else size
        for q in range(start, stop):
            for k in range(start, q):
                (image_q, visual_q), (image_k, visual_k) = owner.get(q, (None, False)), owner.get(k, (None, False))
                if image_q is None:
                    seen = rule.mask == "none" if visual_k else rule.text_sees == "all" or q < f or k >= f
                elif image_q == image_k:
                    seen = not visual_q or rule.mask != "star"
                else:
                    seen = rule.image_sees == "prefix" and (not visual_k or rule.mask == "none")
                allowed[row, q, k] = seen
    return allowed


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_dense_mask_says_the_rule(rule):
    layout = build([[[2, 3, 1], [4]], [[0, 2]]], ImageShape(1, 3, 2))
    assert torch.equal(dense_mask(layout, rule), brute_force(layout, rule))


def test_voco_llama_rule():
    """VoCo-LLaMA's allow(q, k) = k <= q and (q <= l or k >= f) for one image is full + prefix + voco_on."""
    layout = build([[[3, 5]]], ImageShape(0, 6, 2), padding=0)
    f, last = 9, 10
    q, k = torch.arange(16)[:, None], torch.arange(16)[None]
    expected = (k <= q) & ((q <= last) | (k >= f))
    assert torch.equal(dense_mask(layout, MaskRule("full", "prefix", "voco_on"))[0], expected)


def test_text_positions_go_on_uncompressed():
    layout = build([[[2, 3, 1], [4]]], ImageShape(1, 3, 2))
    assert layout.position_ids[0].tolist() == [*range(18), *range(4), 0, 0, 0]


def test_parallel_fusion_shares_positions():
    layout = build([[[1, 2]]], ImageShape(2, 4, 1, "parallel"), padding=0)
    assert layout.position_ids[0].tolist() == [0, 1, 3, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "samples, images",
    [
        ([[0, 0, 9]], [[0, 3]]),
        ([[0, 0, 9], [0, 8, 12]], []),
        ([[0, 0, 40]], []),
        ([[2, 0, 4]], []),
        ([[0, 0, 30]], [[0, 0], [0, 5]]),
        ([], [[0, 0]]),
    ],
)
def test_impossible_layouts_are_refused(samples, images):
    with pytest.raises(ValueError, match="layout"):
        SequenceLayout(2, 32, torch.tensor(samples).view(-1, 3), torch.tensor(images).view(-1, 2), ImageShape(2, 4, 1))

"""Flat ranges as boxes, compared with what indexing an explicit tensor gives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from htc_megatron.checkpoint.boxes import Box, flat_boxes, intersect, shard_boxes
from htc_megatron.weights.table import Weight, partition

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


def region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(first, first + extent) for first, extent in zip(box.offset, box.size, strict=True))


@st.composite
def ranges(draw):
    shape = draw(shapes)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@given(ranges())
def test_boxes_cover_the_range_in_order(case):
    shape, start, stop = case
    places = torch.arange(math.prod(shape)).view(shape)
    boxes = flat_boxes(start, stop, shape)
    found = [place for box in boxes for place in places[region(box)].reshape(-1).tolist()]
    assert found == list(range(start, stop))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


def test_boxes_refuse_a_range_outside():
    with pytest.raises(ValueError, match=r"\[3, 13\) does not lie in a tensor of shape \(3, 4\)"):
        flat_boxes(3, 13, (3, 4))


@given(ranges(), ranges())
def test_intersection_is_what_both_contain(one, other):
    shape, start, stop = one
    for a in flat_boxes(start, stop, shape):
        for b in flat_boxes(0, min(other[2], math.prod(shape)), shape):
            marked = torch.zeros(shape, dtype=torch.int64)
            marked[region(a)] += 1
            marked[region(b)] += 1
            both = intersect(a, b)
            assert (marked == 2).sum() == (0 if both is None else both.numel)
            if both is not None:
                assert (marked[region(both)] == 2).all()


WEIGHTS = st.sampled_from(
    [
        Weight("replicated", (7,), "replicated", ()),
        Weight("patches", (8, 3, 2, 2), "replicated", ()),
        Weight("column", (8, 5), "column", ()),
        Weight("bias", (8,), "column", ()),
        Weight("row", (5, 8), "row", ()),
        Weight("vocab", (10, 3), "vocab", ()),
        Weight("vocab_last_rank_empty", (5, 3), "vocab", ()),
        Weight("qkv", (16, 3), "qkv", (), groups=4, queries_per_group=2, head_dim=1),
        Weight("gated", (2, 8, 3), "gated", ()),
    ]
)


@given(WEIGHTS, st.sampled_from([1, 2, 4]), st.integers(1, 5))
@settings(max_examples=150)
def test_all_ranks_pieces_make_up_the_tensor_once(weight, tp, dp):
    """Cut as Megatron and ZeRO cut: by TP rule, then the flat shard into equal ranges; every real element is in one box."""
    whole = torch.arange(math.prod(weight.shape)).view(weight.shape)
    seen = torch.zeros(weight.shape, dtype=torch.int64)
    for tp_rank in range(tp):
        part = partition(weight, tp_rank, tp)
        if weight.rule == "gated":  # as mcore holds it: this rank's gate rows over its up rows
            share = weight.shape[1] // tp
            local = torch.cat([whole[0, tp_rank * share :][:share], whole[1, tp_rank * share :][:share]]).reshape(-1)
        else:
            local = torch.full(part.local_shape, -1)
            real = tuple(slice(0, extent) for extent in part.size)
            local[real] = whole[region(Box(part.offset, part.size))]
            local = local.reshape(-1)
        per_rank = -(-local.numel() // dp)
        for dp_rank in range(dp):
            start = min(dp_rank * per_rank, local.numel())
            stop = min(start + per_rank, local.numel())
            for box, at in shard_boxes(start, stop, part.view_shape, part.offset, part.size):
                assert torch.equal(whole[region(box)], local[at : at + box.numel].view(box.size))
                seen[region(box)] += 1
    assert (seen == (tp if weight.rule == "replicated" else 1)).all()

"""Tied embeddings: one matrix for input and output on every layout, its two gradients added up wherever the two uses stand."""

import pytest

from htc_megatron.parallel.support import REFERENCE, Layout
from tests.test_parity import assert_same, steps_of

TIED = {"model__backbone__tie_word_embeddings": True}
LAYOUTS = [
    Layout(zero=3),
    Layout(tp=2),
    Layout(pp=2),
    Layout(dp=2, zero=2, recompute="full"),
    Layout(dp=2, zero=3, reduce_once=True),
    Layout(pp=2, dp=2, zero=3),
    Layout(pp=4, zero=2, recompute="full", reduce_once=True),
    Layout(tp=2, pp=2),
    Layout(tp=2, pp=2, zero=3, sequence_parallel=True, recompute="full", reduce_once=True),
]


@pytest.fixture(scope="module")
def one_process(ranks):
    return steps_of(ranks, REFERENCE, **TIED)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_one_process(ranks, one_process, layout):
    assert_same(steps_of(ranks, layout, **TIED), one_process)

"""Each mend that lets DeepSpeed's ZeRO run under mcore's schedules: with it the figures are those of one process (test_parity
compares them too), without it they are not. So none of them can be lost unnoticed, or be carried on when it is not needed."""

import time

import pytest

from htc_megatron.config_io import load_zero
from htc_megatron.parallel.support import REFERENCE, Layout
from tests.distributed import RankFailure, RankTimeout
from tests.quick import quick
from tests.stage_worker import run_without
from tests.test_parity import TOLERANCE, assert_same, changes_of, steps_of

PP2 = Layout(pp=2)


def broken(ranks, mend: str, layout: Layout, timeout: float = 120):
    return ranks(layout.world_size).run(run_without, mend, changes_of(layout), load_zero(f"zero{layout.zero}.json"), timeout=timeout)[0]


def wrong(ours, theirs) -> bool:
    return any(abs(a - b) > 3 * TOLERANCE * abs(b) for (_, a), (_, b) in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def reference(ranks):
    return steps_of(ranks, REFERENCE)


def test_trace_is_compared_within_data_parallel_ranks(ranks, reference):
    layout = Layout(pp=2, zero=3)
    began = time.monotonic()
    assert_same(steps_of(ranks, layout), reference)
    whole = time.monotonic() - began
    with pytest.raises(RankTimeout):  # it waits for ever, and is waited for several times as long as it takes with the mend
        broken(ranks, "trace", layout, timeout=5 + 3 * whole)


@pytest.mark.parametrize("zero", quick([1, 2, 3], [1, 3]))
def test_backward_flag_is_cleared(ranks, reference, zero):
    layout = Layout(pp=2, zero=zero)
    assert_same(steps_of(ranks, layout), reference)
    try:
        assert wrong(broken(ranks, "flag", layout), reference)
    except RankFailure as failure:
        assert not isinstance(failure, RankTimeout)  # ZeRO-1 and 2 raise, ZeRO-3 goes on with a wrong norm


def test_gradients_are_not_divided_by_the_accumulation_steps(ranks, reference):
    assert wrong(broken(ranks, "gas", PP2), reference)


@pytest.mark.parametrize("zero", [1, 3])
def test_norm_counts_replicated_parameters_once_a_stage(ranks, reference, zero):
    layout = Layout(tp=2, pp=2, zero=zero)
    assert_same(steps_of(ranks, layout), reference)
    assert wrong(broken(ranks, "rank", layout), reference)


@pytest.mark.parametrize("zero", quick([1, 2, 3], [1, 3]))
def test_norm_by_pieces_is_deepspeeds_own(ranks, zero):
    """Compared with what it stands for, since a fault of it would be the same in every layout."""
    layout = Layout(tp=2, dp=2, zero=zero)
    assert_same(steps_of(ranks, layout), broken(ranks, "pieces", layout))

"""The support matrix: what is accepted is covered by a tested layout, and the README says the same."""

from itertools import product
from pathlib import Path

import pytest

from htc_megatron.config import ConfigError, ParallelConfig, RunConfig
from htc_megatron.parallel.support import REFERENCE, TESTED, Layout, layout_of, matrix_markdown, refuse_untested, untested

KINDS = [
    Layout(*values)
    for values in product((1, 2), (1, 2), (1, 2), (1, 2, 3), (False, True), ("none", "selective", "full"), (False, True))
    if values[0] > 1 or not values[4]  # sequence parallelism needs tensor parallelism: `check` refuses it
]


def test_rows_are_different_small_and_not_the_reference():
    assert len(set(TESTED)) == len(TESTED) <= 34
    assert REFERENCE not in TESTED
    assert max(row.world_size for row in TESTED) <= 8
    assert all(row.tp > 1 for row in TESTED if row.sequence_parallel)


def test_the_list_covers_every_kind():
    assert [str(kind) for kind in KINDS if any(untested(kind))] == []


def test_larger_sizes_are_of_the_same_kind():
    assert not list(untested(Layout(8, 8, 64, 3, True, "full", True)))
    assert Layout(8, 8, 64, 3).settings == Layout(2, 2, 2, 3).settings


def test_a_gap_in_the_list_is_refused():
    """Without the rows that combine ZeRO-3 with sequence parallelism, exactly the layouts with both are refused."""
    fewer = tuple(row for row in TESTED if not (row.sequence_parallel and row.zero == 3))
    refused = {kind for kind in KINDS if any(untested(kind, fewer))}
    assert {kind for kind in KINDS if kind.sequence_parallel and kind.zero == 3} <= refused
    no_pp = tuple(row for row in TESTED if row.pp == 1)
    assert all(any(untested(kind, no_pp)) for kind in KINDS if kind.pp > 1)
    assert "tensor parallelism on with pipeline parallelism on with data parallelism off with ZeRO stage 2" in untested(
        Layout(tp=2, pp=2, zero=2), TESTED[:11]
    )


def test_a_run_of_an_untested_kind_gets_a_sentence():
    config = RunConfig(parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, recompute="full"))
    assert layout_of(config, 4, 3) == Layout(2, 1, 2, 3, True, "full")
    refuse_untested(config, 4, 3)
    with pytest.raises(ConfigError, match=r"parallel: TP 2 x PP 1 x DP 2, ZeRO-4, sequence parallel, full recompute: got .* is not tested"):
        refuse_untested(config, 4, 4)


def test_the_readme_shows_the_matrix():
    readme = Path(__file__).parent.parent / "README.md"
    assert matrix_markdown() in readme.read_text(encoding="utf-8"), "paste htc_megatron.parallel.support.matrix_markdown() into README.md"


def test_the_matrix_names_every_row():
    table = matrix_markdown()
    assert table.count("refused") == 0 and table.count("\n") == 10
    assert sum(cell.count(";") + 1 for line in table.splitlines()[2:] for cell in line.split("|")[2:5]) == len(TESTED) + 1

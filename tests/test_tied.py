"""Tied embeddings: one matrix for input and output on every layout, its two gradients added up wherever the two uses stand.

Checkpoints of tied models are tested in test_checkpoint_layouts.py, exports in test_hf_parity.py, gradients of every weight
with images in test_gradients.py.
"""

import pytest
import torch

from htc_megatron.config_io import load_zero
from htc_megatron.parallel.support import REFERENCE, TESTED, Layout
from htc_megatron.training.flops import step_flops
from htc_megatron.weights import weights
from tests.distributed import RankFailure, RankTimeout
from tests.parity_worker import micro_batch, tiny_config
from tests.quick import quick
from tests.test_mends import wrong
from tests.test_parity import FROZEN, assert_same, changes_of, steps_of
from tests.tied_worker import run_faulty, tied_gradients

TIED = {"model__backbone__tie_word_embeddings": True}


@pytest.fixture(scope="module")
def one_process(ranks):
    return steps_of(ranks, REFERENCE, **TIED)


@pytest.mark.parametrize("layout", quick(TESTED, TESTED[::3]), ids=str)
def test_equals_one_process(ranks, one_process, layout):
    assert_same(steps_of(ranks, layout, **TIED), one_process)


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("fault", ["not added", "last micro-batch alone", "added at every micro-batch"])
def test_parity_sees_a_wrong_gradient(ranks, one_process, fault, zero):
    """What could go wrong unnoticed does not: the figures leave those of one process, or a rank raises."""
    changes, zero_json = changes_of(Layout(pp=2)) | TIED, load_zero(f"zero{zero}.json")
    try:
        assert wrong(ranks(2).run(run_faulty, fault, changes, zero_json, timeout=120)[0], one_process)
    except RankFailure as failure:
        assert not isinstance(failure, RankTimeout)


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("frozen", ["align: projectors alone", "backbone alone"])
def test_frozen_components(ranks, frozen, zero):
    """A frozen matrix gets no gradient from either use, a trained one from both."""
    changes = TIED | {"training__freeze": FROZEN[frozen]}
    reference = steps_of(ranks, REFERENCE, **changes)
    assert_same(steps_of(ranks, Layout(pp=2, dp=2, zero=zero), parallel__recompute="full", **changes), reference)


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(tp=2, pp=2, zero=3), Layout(pp=2, dp=2, zero=2)], ids=str)
def test_bf16(ranks, layout):
    """The tolerances that test_parity.py has with TP, here also without: the output's gradient is rounded once a step, in one
    process once a micro-batch. In the first step that is all that differs without TP: at most 2^-9 an entry, which the norm of 2,000
    of them averages to 1e-4 at most; later steps start from weights that differ by it."""
    reference = steps_of(ranks, Layout(zero=layout.zero), training__precision="bf16", **TIED)
    ours = steps_of(ranks, layout, training__precision="bf16", **TIED)
    if layout.tp == 1:
        assert_same(ours[:1], reference[:1], 1e-4)
    for (loss, norm), (loss_one, norm_one) in zip(ours, reference, strict=True):
        assert abs(loss - loss_one) <= 2**-9 * loss_one
        assert abs(norm - norm_one) <= 2**-5 * norm_one


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 2)])
def test_gradient_is_that_of_transformers(ranks, tp, pp, zero):
    """The matrix's whole gradient after a step of several micro-batches of text, as ZeRO reduced it, against Qwen2ForCausalLM with
    tie_word_embeddings. fp32, 1e-4 of the norm as in test_gradients.py. Rows that pad the vocabulary get none."""
    changes = TIED | {"parallel__tensor_model_parallel_size": tp, "parallel__pipeline_model_parallel_size": pp}
    shares = [found for found in ranks(tp * pp).run(tied_gradients, changes, load_zero(f"zero{zero}.json")) if found is not None]
    theirs = shares[0][1]
    ours = torch.cat([share for share, _ in shares])
    rows = len(theirs)
    assert len(ours) == -(-rows // tp) * tp and not ours[rows:].any()
    assert (ours[:rows] - theirs).norm() < 1e-4 * theirs.norm()


def test_the_matrix_is_one_weight():
    tied, untied = ({weight.name for weight in weights(tiny_config(**changes).model)} for changes in (TIED, {}))
    assert untied - tied == {"backbone.output_layer.weight"} and tied < untied


def test_operations_are_those_of_untied_embeddings():
    batch = micro_batch(tiny_config(), 0)
    assert step_flops(tiny_config(**TIED), [batch]) == step_flops(tiny_config(), [batch])

"""Every layout of the support matrix computes what one process computes.

Loss and gradient norm of four optimiser steps, clipping on, four micro-batches a step with images, several images and text
alone: 1e-5 relative in fp32. Rounding alone gives about 1e-7 at the first step; Adam's division by small second moments
lets it grow a little with each step, which is why the learning rate is an ordinary one.
"""

import pytest

from htc_megatron.config_io import load_zero
from htc_megatron.parallel.support import REFERENCE, TESTED, Layout
from tests.parity_worker import frames_compiled, run_steps
from tests.quick import quick

TOLERANCE = 1e-5


def changes_of(layout: Layout) -> dict:
    return {
        "parallel__tensor_model_parallel_size": layout.tp,
        "parallel__pipeline_model_parallel_size": layout.pp,
        "parallel__sequence_parallel": layout.sequence_parallel,
        "parallel__recompute": layout.recompute,
        "parallel__reduce_once": layout.reduce_once,
    }


def steps_of(ranks, layout: Layout, **changes) -> list[tuple[float, float]]:
    """The layout's figures, which all of its ranks must agree on."""
    zero = load_zero(f"zero{layout.zero}.json")
    if layout.zero == 3:  # by default small parameters stay whole, which here would be all of them
        zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    answers = ranks(layout.world_size).run(run_steps, changes_of(layout) | changes, zero, timeout=240)
    assert all(answer == answers[0] for answer in answers), "ranks report different losses or norms"
    return answers[0]


def assert_same(ours, theirs, tolerance=TOLERANCE):
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for name, a, b in zip(("loss", "gradient norm"), one, other, strict=True):
            assert abs(a - b) <= tolerance * abs(b), f"step {step}: {name} {a!r} instead of {b!r}"


@pytest.fixture(scope="module")
def one_process(ranks):
    return steps_of(ranks, REFERENCE)


@pytest.mark.parametrize("layout", TESTED, ids=str)
def test_equals_one_process(ranks, one_process, layout):
    assert_same(steps_of(ranks, layout), one_process)


@pytest.mark.parametrize(
    "layout", [REFERENCE, Layout(tp=2, pp=2, zero=3, sequence_parallel=True, recompute="selective", reduce_once=True)], ids=str
)
def test_nothing_is_compiled_as_it_runs(ranks, layout):
    """torch.compile compiles again as shapes come along, so the bits of a step would depend on what its process did before."""
    compiled = ranks(layout.world_size).run(frames_compiled, changes_of(layout), load_zero(f"zero{layout.zero}.json"))
    assert compiled == [0] * layout.world_size


def test_dense_attention_is_the_same_model(ranks, one_process):
    assert_same(steps_of(ranks, REFERENCE, parallel__attention="dense"), one_process)


METHODS = {
    "full mask, prefix, voco_on, two voco": dict(mask="full", image_sees="prefix", text_sees="voco_on", num_voco_tokens=2),
    "no mask, prefix, no voco": dict(mask="none", image_sees="prefix", num_voco_tokens=0),
    "discrete, linear": dict(channels="discrete"),
    "continuous, linear projector": dict(channels="continuous", projector="linear"),
    "post-fusion": dict(fusion="post"),
    "parallel fusion, star with prefix": dict(fusion="parallel", image_sees="prefix"),
    "Q-Former to one token": dict(channels="continuous", resampler="qformer", mask="none", image_sees="prefix", num_voco_tokens=0),
    "average to one token": dict(channels="continuous", resampler="average", mask="none", image_sees="prefix", num_voco_tokens=0),
    "Q-Former to three tokens, star": dict(resampler="qformer", num_resampled_tokens=3, resampler_layers=1),
    "average to four tokens, K = 4": dict(resampler="average", num_resampled_tokens=4, num_voco_tokens=4),
    "random anchors, K = 4": dict(anchor_source="random", anchor_seed=5, num_voco_tokens=4),
    "anchors by CLS's attention": dict(anchor_source="topk_attention"),
    "anchors by k-means": dict(anchor_source="kmeans", num_anchors=3),
}


VARIANTS = {name: {f"model__method__{key}": value for key, value in changes.items()} for name, changes in METHODS.items()}
VARIANTS |= {  # as the paper varies them: anchors are made of codes of another shape
    f"MGVQ of {groups} groups, {size} entries": {"model__mgvq__groups": groups, "model__mgvq__codebook_size": size}
    for groups, size in ((1, 32), (4, 16), (2, 128))
}


OFTEN = [  # of a run of all tests: each branch once
    "full mask, prefix, voco_on, two voco",
    "no mask, prefix, no voco",
    "continuous, linear projector",
    "parallel fusion, star with prefix",
    "Q-Former to three tokens, star",
    "average to four tokens, K = 4",
    "anchors by k-means",
    "MGVQ of 4 groups, 16 entries",
]


@pytest.mark.parametrize("variant", quick(VARIANTS, OFTEN), ids=str)
def test_variants_of_the_model(ranks, variant):
    """One process with the dense mask against TP 2 x PP 2 under ZeRO-3 with split attention."""
    changes = VARIANTS[variant]
    reference = steps_of(ranks, REFERENCE, parallel__attention="dense", **changes)
    assert_same(steps_of(ranks, Layout(tp=2, pp=2, zero=3), **changes), reference)


FROZEN = {
    "align: projectors alone": ["vision", "backbone", "voco"],
    "instruct: frozen tower": ["vision"],
    "voco row alone": ["vision", "projector", "anchors", "backbone"],
    "backbone alone": ["vision", "projector", "anchors", "voco"],
}


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_frozen_components(ranks, frozen, zero):
    """Stages on which everything is frozen take part all the same."""
    changes = {"training__freeze": FROZEN[frozen]}
    reference = steps_of(ranks, REFERENCE, **changes)
    assert_same(steps_of(ranks, Layout(pp=2, dp=2, zero=zero), parallel__recompute="full", **changes), reference)


UNEQUAL = [  # (layout, layers of its stages, what is frozen)
    (Layout(pp=2), [5, 1], []),
    (Layout(pp=4, zero=3, recompute="full"), [1, 3, 1, 1], []),
    (Layout(tp=2, pp=2, zero=3, sequence_parallel=True), [2, 4], []),
    (Layout(tp=2, pp=2, dp=2, recompute="selective"), [1, 5], FROZEN["align: projectors alone"]),
    (Layout(pp=2, dp=2, zero=3, recompute="full"), [4, 2], FROZEN["align: projectors alone"]),
]


@pytest.mark.parametrize("layout, layers, frozen", UNEQUAL, ids=str)
def test_stages_of_unequal_depth(ranks, layout, layers, frozen):
    changes = {"model__backbone__num_layers": 6, "training__freeze": frozen}
    ours = steps_of(ranks, layout, parallel__layers_per_stage=layers, **changes)
    assert_same(ours, steps_of(ranks, REFERENCE, **changes))


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(tp=2, pp=2, zero=3), Layout(pp=2, dp=2, zero=2)], ids=str)
def test_bf16(ranks, layout):
    """bf16 rounds at 2^-8. TP splits products whose parts are rounded, so losses move by half of that and norms by a few of it,
    as far as bf16 itself is from fp32; PP and DP split no product and change nothing but fp32 sums."""
    reference = steps_of(ranks, Layout(zero=layout.zero), training__precision="bf16")
    of_loss, of_norm = (2**-9, 2**-5) if layout.tp > 1 else (TOLERANCE, TOLERANCE)
    for (loss, norm), (loss_one, norm_one) in zip(steps_of(ranks, layout, training__precision="bf16"), reference, strict=True):
        assert abs(loss - loss_one) <= of_loss * loss_one
        assert abs(norm - norm_one) <= of_norm * norm_one

"""LoRA on the backbone: every layout trains the same adapters and nothing else, and they are what peft and transformers compute."""

import pytest
import torch

from htc_megatron.config_io import load_zero
from htc_megatron.parallel.support import REFERENCE, Layout
from htc_megatron.weights.table import is_adapter, partition, weights
from tests.lora_worker import adapter_gradients, beside_transformers, lora_config, lora_steps
from tests.test_parity import assert_same, changes_of

TARGETS = {
    "all": {},
    "q and v": {"model__lora": {"rank": 4, "alpha": 6.0, "targets": ["q_proj", "v_proj"]}},
    "k, o, up and down": {"model__lora": {"rank": 3, "alpha": 6.0, "targets": ["down_proj", "k_proj", "o_proj", "up_proj"]}},
}
LAYOUTS = [
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2, dp=2, zero=3),
    Layout(tp=2, pp=2),
    Layout(tp=2, dp=2, zero=3, sequence_parallel=True, recompute="full"),
]


def zero_of(layout: Layout) -> dict:
    zero = load_zero(f"zero{layout.zero}.json")
    if layout.zero == 3:
        zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return zero


def steps_of(ranks, layout: Layout, *args, **changes):
    """The layout's figures, which all of its ranks agree on, and what moved on any of them."""
    answers = ranks(layout.world_size).run(lora_steps, changes_of(layout) | changes, zero_of(layout), *args, timeout=240)
    assert all(results == answers[0][0] for results, _ in answers), "ranks report different losses or norms"
    moved: dict[str, bool] = {}
    for _, of_rank in answers:
        for name, value in of_rank.items():
            assert moved.setdefault(name, value) == value, f"{name} moved on one rank and not on another"
    return answers[0][0], moved


@pytest.fixture(scope="module")
def one_process(ranks):
    return {targets: steps_of(ranks, REFERENCE, **TARGETS[targets]) for targets in ("all", "q and v")}


@pytest.mark.parametrize("targets", ["all", "q and v"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_one_process(ranks, one_process, layout, targets):
    """As tests/test_parity.py, to the same 1e-5; and adapters and the unfrozen front-end move, nothing else does."""
    results, moved = steps_of(ranks, layout, **TARGETS[targets])
    assert_same(results, one_process[targets][0])
    trained = ("frontend.projector.", "frontend.anchors.", "frontend.voco.")
    assert moved.keys() == {weight.name for weight in weights(lora_config(**TARGETS[targets]).model)}
    assert {name for name, value in moved.items() if value} == {n for n in moved if is_adapter(n) or n.startswith(trained)}


def whole_gradients(ranks, layout: Layout, *args, **changes) -> dict[str, torch.Tensor]:
    """Gradients in the stored global form; TP ranks must agree on those of weights that are whole on each of them."""
    of_ranks = ranks(layout.world_size).run(adapter_gradients, changes_of(layout) | changes, *args)
    found = {}
    for weight in weights(lora_config(**changes).model):
        if not is_adapter(weight.name):
            continue
        whole = torch.full(weight.shape, torch.nan)
        for rank, gradients in enumerate(of_ranks):
            part = partition(weight, rank, layout.tp)
            place = tuple(slice(o, o + n) for o, n in zip(part.offset, part.size, strict=True))
            mine = gradients[weight.name].view(part.view_shape)
            assert weight.is_cut or rank == 0 or torch.equal(whole[place], mine), f"{weight.name}: another gradient on TP rank {rank}"
            whole[place] = mine
        assert whole.isfinite().all() and whole.abs().max() > 0
        found[weight.name] = whole
    return found


def worst(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_gradients_over_tensor_parallelism(ranks, targets, sequence_parallel, recompute):
    """Each adapter's gradient by itself, to 1e-5 of its norm: sums in another order through four layers give about 1e-6."""
    layout = Layout(tp=2, sequence_parallel=sequence_parallel, recompute=recompute)
    reference = whole_gradients(ranks, REFERENCE, **TARGETS[targets])
    assert worst(whole_gradients(ranks, layout, **TARGETS[targets]), reference) < 1e-5


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradients_need_their_sum_over_tensor_parallelism(ranks, sequence_parallel):
    """Without it TP ranks hold different gradients of the same weight: the comparison above can fail."""
    layout = Layout(tp=2, sequence_parallel=sequence_parallel)
    with pytest.raises(AssertionError, match="another gradient on TP rank 1"):
        whole_gradients(ranks, layout, "copy_to_tensor_model_parallel_region")


@pytest.mark.parametrize("targets", TARGETS)
def test_equals_merged_weights_in_transformers(ranks, targets):
    """Logits and gradients to 1e-5 of their norm: x (W + s B A)^T is rounded otherwise than x W^T + s (x A^T) B^T."""
    pairs = ranks(1).run(beside_transformers, TARGETS[targets])[0]
    model = lora_config(**TARGETS[targets]).model
    assert len(pairs) == 2 + 2 * model.backbone.num_layers * len(model.lora.targets)  # two samples; an A and a B a linear
    for name, (ours, theirs) in pairs.items():
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < 1e-5, f"{name}: {error:.2e}"

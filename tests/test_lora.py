"""LoRA on the backbone: every layout trains the same adapters and nothing else, and they are what peft and transformers compute."""

from pathlib import Path

import pytest
import torch

from htc_megatron.checkpoint import CheckpointReader
from htc_megatron.config_io import load_zero
from htc_megatron.model.initialisation import initial_value
from htc_megatron.parallel.support import REFERENCE, Layout
from htc_megatron.weights.table import is_adapter, partition, weights
from tests.distributed import RankFailure
from tests.lora_worker import adapter_gradients, beside_transformers, lora_config, lora_steps
from tests.quick import quick
from tests.test_parity import assert_same, changes_of
from tests.train_worker import train
from tests.training_tiny import make_run

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


CASES = [(layout, targets) for targets in ("all", "q and v") for layout in LAYOUTS]


@pytest.mark.parametrize("layout, targets", quick(CASES, [case for case in CASES if case[1] == "all"]), ids=str)
def test_equals_one_process(ranks, one_process, layout, targets):
    """As tests/test_parity.py, to the same 1e-5; and adapters and the unfrozen front-end move, nothing else does."""
    results, moved = steps_of(ranks, layout, **TARGETS[targets])
    assert_same(results, one_process[targets][0])
    trained = ("frontend.projector.", "frontend.anchors.", "frontend.voco.")
    assert moved.keys() == {weight.name for weight in weights(lora_config(**TARGETS[targets]).model)}
    assert {name for name, value in moved.items() if value} == {n for n in moved if is_adapter(n) or n.startswith(trained)}


@pytest.mark.parametrize("layout", [Layout(tp=2, sequence_parallel=True), Layout(pp=2, dp=2, recompute="full")], ids=str)
def test_adapters_alone(ranks, layout):
    """With the front-end frozen too, no gradient is wanted of the first layer's input, and adapters alone move."""
    changes = {"training__freeze": ["vision", "projector", "anchors", "voco", "backbone"]}
    results, moved = steps_of(ranks, layout, **changes)
    assert_same(results, steps_of(ranks, REFERENCE, **changes)[0])
    assert {name for name, value in moved.items() if value} == set(filter(is_adapter, moved))


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(tp=2, zero=3, sequence_parallel=True), Layout(pp=2, dp=2, zero=2)], ids=str)
def test_bf16(ranks, layout):
    """The bounds of tests/test_parity.py. PP and DP split no product and give what one process gives; TP splits products whose parts
    are rounded to 2^-8, so it is compared with fp32, from which one process in bf16 is as far."""
    precision = "fp32" if layout.tp > 1 else "bf16"
    reference, _ = steps_of(ranks, Layout(zero=layout.zero), training__precision=precision)
    ours, _ = steps_of(ranks, layout, training__precision="bf16")
    of_loss, of_norm = (2**-9, 2**-5) if layout.tp > 1 else (1e-5, 1e-5)
    for (loss, norm), (loss_one, norm_one) in zip(ours, reference, strict=True):
        assert abs(loss - loss_one) <= of_loss * loss_one
        assert abs(norm - norm_one) <= of_norm * norm_one


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


SPLITS = [(False, "none"), (False, "full"), (True, "none"), (True, "full")]


@pytest.mark.parametrize("sequence_parallel, recompute", quick(SPLITS, [(False, "none"), (True, "full")]))
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


@pytest.mark.parametrize("rule", ["stacked", "row"])
def test_new_adapters_are_pefts(rule):
    """A uniform in +-1 / sqrt(inputs), which is kaiming_uniform_ with a = sqrt(5); B zero; both the same at any TP."""
    of_rule = [w for w in weights(lora_config(model__lora={"rank": 64}).model) if is_adapter(w.name) and w.rule == rule]
    for weight in of_rule:
        whole, inputs = initial_value(weight, 0, 0, 1).view(weight.shape), weight.shape[-1]
        like_pefts = torch.nn.init.kaiming_uniform_(torch.empty(4096, inputs), a=5**0.5)
        assert whole.abs().max() < inputs**-0.5 and float(whole.abs().max()) == pytest.approx(float(like_pefts.abs().max()), rel=0.01)
        assert float(whole.std()) == pytest.approx(float(like_pefts.std()), rel=0.05)
        for rank in range(2):
            part = partition(weight, rank, 2)
            place = tuple(slice(o, o + n) for o, n in zip(part.offset, part.size, strict=True))
            assert torch.equal(initial_value(weight, 0, rank, 2).view(part.view_shape), whole[place])
    assert len({float(initial_value(weight, 0, 0, 1).flatten()[0]) for weight in of_rule}) == len(of_rule) > 4
    assert not any(initial_value(w, 0, 0, 1).any() for w in weights(lora_config().model) if w.name.endswith("lora_B"))


def test_a_checkpoint_goes_on_on_another_layout(ranks, one_process, tmp_path):
    """Two steps at TP 2 x PP 2, the other two in one process: one process's figures to 1e-5, and not a bit of a weight is lost."""
    steps_of(ranks, Layout(tp=2, pp=2), 0, 2, "", str(tmp_path / "two"))
    results, _ = steps_of(ranks, REFERENCE, 2, 4, str(tmp_path / "two"))
    assert_same(results, one_process["all"][0][2:])
    steps_of(ranks, REFERENCE, 2, 2, str(tmp_path / "two"), str(tmp_path / "same"))
    two, same = (CheckpointReader(tmp_path / name) for name in ("two", "same"))
    assert two.names == same.names and sum(map(is_adapter, two.names)) == 4 * 8
    assert {key.split("/")[-1] for key in two.manifest.tensors if key.startswith("optimizer/")} >= set(filter(is_adapter, two.names))
    for key in two.manifest.tensors:
        assert torch.equal(two.read(key), same.read(key)), key


# ----------------------------------------------------------------------------------------------------------- whole runs

LORA = ["model.lora.rank=4", "training.freeze=[vision,backbone]"]


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory) -> Path:
    """A run of two steps without adapters, in `base`."""
    yaml = make_run(tmp_path_factory.mktemp("lora"))
    ranks(1).run(train, str(yaml), ["training.train_iters=2", f"output_dir={yaml.parent}/base"])
    return yaml


def adapted_run(ranks, run: Path, world_size: int, name: str, *overrides: str) -> list[tuple[int, float, float]]:
    """Four steps with new adapters from `base`."""
    common = [*LORA, f"init_from={run.parent}/base/checkpoints", "training.train_iters=4", f"output_dir={run.parent}/{name}"]
    return ranks(world_size).run(train, str(run), [*common, *overrides], timeout=240)[0]


@pytest.fixture(scope="module")
def adapted(ranks, run):
    return adapted_run(ranks, run, 1, "adapted")


def test_adapters_start_from_a_checkpoint_without_them(ranks, run, adapted):
    """On any layout alike, at the loss that the base model has, and what is frozen stays the base's to the bit."""
    plain = ["training.freeze=[vision,backbone]", f"init_from={run.parent}/base/checkpoints", "training.train_iters=1"]
    without = ranks(1).run(train, str(run), [*plain, f"output_dir={run.parent}/plain"])[0]
    assert adapted[0][1] == without[0][1]
    parallel = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2", "zero=zero3.json"]
    for ours, theirs in zip(adapted_run(ranks, run, 4, "parallel", *parallel), adapted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    base, after = (CheckpointReader(run.parent / name / "checkpoints") for name in ("base", "adapted"))
    for name in after.names:
        if is_adapter(name):
            assert name not in base.names and after.tensor(name).any()
        elif name.startswith(("backbone.", "frontend.vision.")):
            assert torch.equal(after.tensor(name), base.tensor(name)), name


def test_adapters_start_from_a_checkpoint_with_them(ranks, run, adapted):
    """The adapters are the checkpoint's: with hardly a step made on them they are still, and none of them new."""
    start = [*LORA, f"init_from={run.parent}/adapted/checkpoints", "training.train_iters=1", "optimizer.lr=1e-12"]
    ranks(1).run(train, str(run), [*start, f"output_dir={run.parent}/again"])
    before, after = (CheckpointReader(run.parent / name / "checkpoints") for name in ("adapted", "again"))
    for name in filter(is_adapter, before.names):
        torch.testing.assert_close(after.tensor(name), before.tensor(name), atol=1e-9, rtol=0)


REFUSED = {
    "resuming without adapters": (
        [*LORA, "output_dir={base}/base", "training.train_iters=3"],
        "does not fit this model; tensors .* missing: model/backbone.*linear_fc1.lora_A",
    ),
    "another alpha": ([*LORA, "init_from={base}/adapted/checkpoints", "model.lora.alpha=32"], "model.lora.alpha: got 32.0, wanted 16.0"),
    "another rank": ([*LORA, "init_from={base}/adapted/checkpoints", "model.lora.rank=2"], "of another shape: .*lora_A"),
    "some of its adapters alone": (
        [*LORA, "init_from={base}/adapted/checkpoints", "model.lora.targets=[o_proj]"],
        "not part of this model: .*linear_qkv.lora_A",
    ),
    "adapters that are to be merged first": (["init_from={base}/adapted/checkpoints"], "not part of this model: .*linear_qkv.lora_A"),
    "a base of another kind": (
        [*LORA, "init_from={base}/base/checkpoints", "model.backbone.qkv_bias=true"],
        "missing: model/backbone.decoder.layers.0.self_attention.linear_qkv.bias",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(ranks, run, adapted, case):
    overrides, wanted = REFUSED[case]
    with pytest.raises(RankFailure, match=wanted):
        elsewhere = [f"output_dir={run.parent}/refused"]
        ranks(1).run(train, str(run), elsewhere + [text.replace("{base}", str(run.parent)) for text in overrides])
    assert not (run.parent / "refused" / "checkpoints").exists()

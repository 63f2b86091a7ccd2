"""DeepSpeed engines saved and loaded on other layouts, against the plain arithmetic of AdamW on whole tensors.

The toy model's loss is a sum over elements, so every element's training depends on nothing but itself, whatever the layout.
"""

import re

import pytest
import torch

from htc_megatron.checkpoint import CheckpointError, CheckpointReader, load, save
from htc_megatron.checkpoint.zero_state import EngineState
from htc_megatron.config import RunConfig
from tests.checkpoint_toy import OFFLOAD, build, expected, job, stages_may_differ, train, value_of, weight_of
from tests.distributed import RankFailure


def everything(folder) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    reader.verify()
    return {key: reader.read(key) for key in reader.manifest.tensors if not key.startswith("rng/")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    wrong = [key for key in a if not torch.equal(a[key], b[key])]
    assert not wrong, {key: (a[key] - b[key]).abs().max().item() for key in wrong}


FLAVOURS = {  # name: (ranks, (TP, PP), stage, further settings)
    "one process": (1, (1, 1), 1, {}),
    "DP2 ZeRO-1": (2, (1, 1), 1, {}),
    "DP2 ZeRO-2": (2, (1, 1), 2, {}),
    "DP2 ZeRO-3": (2, (1, 1), 3, {"stage3_param_persistence_threshold": 0}),
    "DP3 ZeRO-3, persistent, sub-groups": (3, (1, 1), 3, {"stage3_param_persistence_threshold": 20, "sub_group_size": 30}),
    "TP2 PP2 ZeRO-1": (4, (2, 2), 1, {}),
    "TP2 DP2 ZeRO-2": (4, (2, 1), 2, {}),
    "TP2 DP2 ZeRO-3, zero.Init": (4, (2, 1), 3, {"stage3_param_persistence_threshold": 10, "init": True}),
    "PP2 DP2 ZeRO-3": (4, (1, 2), 3, {"stage3_param_persistence_threshold": 10}),
    "DP2 ZeRO-2, offloaded": (2, (1, 1), 2, OFFLOAD),
    "DP2 ZeRO-3, offloaded": (2, (1, 1), 3, OFFLOAD),
}
BF16 = {
    "DP2 ZeRO-1": (2, (1, 1), 1, {}),  # DeepSpeed's BF16_Optimizer
    "TP2 DP2 ZeRO-2": (4, (2, 1), 2, {}),
    "PP2 DP2 ZeRO-3": (4, (1, 2), 3, {"stage3_param_persistence_threshold": 10}),
}


@pytest.fixture(scope="module")
def written(ranks, tmp_path_factory):
    """A checkpoint after 3 steps, by every flavour."""
    root = tmp_path_factory.mktemp("written")
    for name, (world, layout, stage, settings) in FLAVOURS.items():
        ranks(world).run(job, layout, stage, steps=3, folder=root / name, **settings)
    return root


@pytest.mark.parametrize("name", FLAVOURS)
def test_every_layout_writes_the_same_checkpoint(written, name):
    """Every element of weights and moments, to 1e-6: AdamW's vectorised kernels may round the last elements of a buffer
    otherwise, and the reference's buffers have other lengths."""
    found, reference = everything(written / name), expected(3)
    assert found.keys() == reference.keys()
    for key, value in reference.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("target", FLAVOURS)
def test_any_layout_loads_what_any_layout_wrote(ranks, written, tmp_path, target):
    """Loaded and saved again, no bit of weights, moments and frozen weights has changed. A part of all pairs."""
    world, layout, stage, settings = FLAVOURS[target]
    names = list(FLAVOURS)
    for source in (names[(names.index(target) + step) % len(names)] for step in (0, 3, 7)):
        (_, _, loaded), *_ = ranks(world).run(job, layout, stage, start=written / source, folder=tmp_path / source, **settings)
        assert loaded[:2] == (3, {"consumed": 24})
        assert loaded[2] or source != target
        same(everything(tmp_path / source), everything(written / source))


@pytest.mark.parametrize("source", ["DP2 ZeRO-3", "TP2 PP2 ZeRO-1"])
@pytest.mark.parametrize("target", ["DP2 ZeRO-1", "DP3 ZeRO-3, persistent, sub-groups", "TP2 DP2 ZeRO-2"])
def test_training_goes_on_alike_on_another_layout(ranks, written, tmp_path, source, target):
    """Three steps on one layout and two on another, to 1e-6 of five on whole tensors (rounding as above)."""
    world, layout, stage, settings = FLAVOURS[target]
    ranks(world).run(job, layout, stage, start=written / source, steps=2, folder=tmp_path, **settings)
    found = everything(tmp_path)
    for key, value in expected(5).items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BF16)
def test_resume_on_the_same_layout_changes_no_bit(ranks, tmp_path, name, precision):
    """Five steps, and three and two with a save between: the same losses, weights, moments and random numbers. The engine that
    loads has trained before, so its state exists and its small parameters are gathered."""
    world, layout, stage, settings = BF16[name]
    run = lambda **more: ranks(world).run(job, layout, stage, precision=precision, **settings, **more)  # noqa: E731
    whole = run(steps=5, folder=tmp_path / "whole")
    first = run(steps=3, folder=tmp_path / "first")
    second = run(start=tmp_path / "first", steps=2, folder=tmp_path / "second", warm=2)
    assert [a[0] + b[0] for a, b in zip(first, second, strict=True)] == [rank[0] for rank in whole]
    assert [rank[1] for rank in second] == [rank[1] for rank in whole]
    assert all(rank[2] == (3, {"consumed": 24}, True) for rank in second)
    same(everything(tmp_path / "whole"), everything(tmp_path / "second"))


def test_bf16_keeps_the_master_weights_bits_across_stages(ranks, tmp_path):
    """From bf16 under ZeRO-1 to bf16 under ZeRO-3 to fp32: the checkpoint is the fp32 master, never the rounded copy."""
    folders = [tmp_path / name for name in "abc"]
    ranks(2).run(job, (1, 1), 1, precision="bf16", steps=3, folder=folders[0])
    ranks(4).run(job, (2, 1), 3, precision="bf16", start=folders[0], folder=folders[1])
    ranks(1).run(job, (1, 1), 1, precision="fp32", start=folders[1], folder=folders[2])
    one, two, three = map(everything, folders)
    same(one, two)
    same(two, three)
    assert not torch.equal(one["model/qkv.weight"], one["model/qkv.weight"].bfloat16().float())


def test_weights_alone_start_another_run(ranks, written, tmp_path):
    """optimizer=False: the weights of the checkpoint, moments of a fresh optimizer; and before any step they are zero."""
    ranks(2).run(job, (1, 1), 2, start=written / "TP2 PP2 ZeRO-1", folder=tmp_path, optimizer=False)
    found, source = everything(tmp_path), everything(written / "TP2 PP2 ZeRO-1")
    assert CheckpointReader(tmp_path).manifest.optimizer_step == 0
    for key, value in found.items():
        assert torch.equal(value, source[key]) if key.startswith("model/") else not value.any(), key


def frozen_job(start, folder, **zero):
    with stages_may_differ():
        engine, state = build((1, 1), 3, seed=" another", trained=False, **zero)
        engine(torch.tensor(1.0))  # leaves small parameters gathered
        load(start, state, optimizer=False)
        gathered = [part.weight for part in engine.module.parts if part.weight.numel()]
        assert len(gathered) == (0 if zero else 3)
        names = [entry.name for entry in state.entries]
        assert all(torch.equal(w, value_of(name, w.shape)) for name, w in zip(names, gathered, strict=False)), "stale after the load"
        save(folder, state, step=1, config=RunConfig(), optimizer=False)


def test_a_stage_without_trained_parameters(ranks, tmp_path):
    """ZeRO-3 without an optimizer: the frozen weights are cut up, and saved and loaded like any others."""
    ranks(3).run(frozen_source, tmp_path / "source")
    ranks(2).run(frozen_job, tmp_path / "source", tmp_path / "copy")
    ranks(3).run(frozen_job, tmp_path / "copy", tmp_path / "copy", stage3_param_persistence_threshold=0)
    same(everything(tmp_path / "source"), everything(tmp_path / "copy"))
    assert CheckpointReader(tmp_path / "copy").manifest.optimizer_step is None


def frozen_source(folder):
    with stages_may_differ():
        _, state = build((1, 1), 3, trained=False, stage3_param_persistence_threshold=0)
        save(folder, state, step=1, config=RunConfig(), optimizer=False)


def wrong_job(case, folder):
    with stages_may_differ():
        engine, state = build((1, 1), 3)
        if case == "unnamed":
            EngineState(engine, state.entries[1:], state.place)
        elif case == "round robin":
            state.zero.round_robin_gradients = True
            EngineState(engine, state.entries, state.place)
        elif case == "amsgrad":
            train(engine, 0, 1)
            for kept in state.inner.state.values():
                kept["max_exp_avg_sq"] = kept["exp_avg_sq"].clone()
            save(folder, state, step=9, config=RunConfig())
        elif case == "sgd":
            state.zero.optimizer = torch.optim.SGD([torch.zeros(1)])
            EngineState(engine, state.entries, state.place)
        elif case == "DeepSpeed changed":
            del state.zero.fp32_partitioned_groups_flat
            EngineState(engine, state.entries, state.place)
        elif case == "shape":
            entries = [
                entry._replace(weight=weight_of("proj.weight", (5, 9), "row")) if i == 7 else entry for i, entry in enumerate(state.entries)
            ]
            EngineState(engine, entries, state.place)
        elif case == "renamed":
            state.entries = [entry._replace(name="surplus") if i == 7 else entry for i, entry in enumerate(state.entries)]
            load(folder, state)
        elif case == "one rank cannot read":
            state.shards = (lambda _: 1 / 0) if state.place.rank == 1 else state.shards
            load(folder, state)
        elif case == "one rank cannot write":
            shards = state.shards
            state.shards = (lambda optimizer: list(shards(optimizer))[1:]) if state.place.rank == 1 else shards
            save(folder, state, step=9, config=RunConfig())


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("unnamed", "parameters without a global name would be lost: parts.0.weight"),
        ("shape", r"proj.weight is \(5, 8\) on TP rank 0 of 1, not \(5, 9\)"),
        ("round robin", "round_robin_gradients reorders"),
        ("amsgrad", r"optimizer state \['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'\]: checkpoints know"),
        ("sgd", "optimizer SGD: checkpoints know the state of Adam and AdamW only"),
        ("DeepSpeed changed", "DeepSpeedZeroOptimizer_Stage3 has no fp32_partitioned_groups_flat: .* DeepSpeed 0.19.8"),
        ("renamed", "3 missing: model/surplus, .*; 3 not part of this model: model/proj.weight, "),
        ("one rank cannot read", "ZeroDivisionError"),
        (
            "one rank cannot write",
            "the ranks' shards do not make up the model: model/embedding.weight of shape .* the ranks hold 17 of its 33",
        ),
    ],
)
def test_refusals_reach_every_rank(ranks, written, case, sentence):
    """A rank that fails alone must not leave the other waiting: both raise the sentence, and the old checkpoint stays."""
    folder = written / "DP2 ZeRO-3"
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(RankFailure) as failure:
        ranks(2).run(wrong_job, case, folder, timeout=60)
    assert sorted(failure.value.exceptions) == [0, 1]
    for error in failure.value.exceptions.values():
        assert isinstance(error, CheckpointError)
        assert re.search(sentence, str(error)), str(error)
    assert sorted(path.name for path in folder.iterdir()) == before

"""The real model: saved on one layout, gone on with on another, compared with the run that was never interrupted."""

import pytest
import torch

from htc_megatron.checkpoint import CheckpointReader, load, save
from tests.parity_worker import MIXED, local_batches, tiny_config
from tests.quick import quick

BEFORE, AFTER = 5, 5  # optimiser steps on either side of the save
LAYOUTS = {  # name: (ranks, TP, PP, ZeRO stage)
    "one process": (1, 1, 1, 1),
    "TP2": (2, 2, 1, 1),
    "PP2": (2, 1, 2, 1),
    "DP2 ZeRO-3": (2, 1, 1, 3),
    "TP2 x PP2": (4, 2, 2, 1),
    "PP2 x DP2 ZeRO-3": (4, 1, 2, 3),
    "DP4 ZeRO-2": (4, 1, 1, 2),
}
FREEZE = ["vision"]  # a frozen part belongs in every checkpoint too


def setup(tp: int, pp: int, stage: int, tied: bool = False, layers: str | list[int] = "balanced"):
    from htc_megatron.parallel import groups as process_groups
    from htc_megatron.training.build import build_engine, checkpoint_state

    sizes = dict(parallel__tensor_model_parallel_size=tp, parallel__pipeline_model_parallel_size=pp, parallel__layers_per_stage=layers)
    config = tiny_config(**sizes, training__freeze=FREEZE, model__backbone__tie_word_embeddings=tied)
    groups = process_groups.initialise(config.parallel, config.training.seed)
    zero = {"zero_optimization": {"stage": stage}}
    if stage == 3:  # by default small parameters stay whole, which here would be all of them
        zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = build_engine(config, zero, groups)
    return config, groups, engine, checkpoint_state(engine, config)


def train(config, groups, engine, first: int, steps: int) -> list[tuple[float, float]]:
    from htc_megatron.training.step import train_step

    results = []
    for step in range(first, first + steps):
        mine = local_batches(config, step, MIXED, groups)
        result = train_step(engine, mine, config.optimizer.lr)
        results.append((result.loss, result.grad_norm))
    return results


def uninterrupted(layout, folder):
    """Train through, with a save in the middle and one at the end."""
    config, groups, engine, state = setup(*layout)
    train(config, groups, engine, 0, BEFORE)
    save(folder / "middle", state, step=BEFORE, config=config)
    results = train(config, groups, engine, BEFORE, AFTER)
    save(folder / "end", state, step=BEFORE + AFTER, config=config)
    engine.destroy()
    return results


def interrupted(layout, sources, out):
    """Go on from each checkpoint in turn, in the same engine: a load leaves nothing of what was there before."""
    config, groups, engine, state = setup(*layout)
    results = {}
    for name, folder in sources.items():
        assert load(folder / "middle", state).step == BEFORE
        results[name] = train(config, groups, engine, BEFORE, AFTER)
        save(out / name, state, step=BEFORE + AFTER, config=config)
    engine.destroy()
    return results


def carried(layout, source, out) -> None:
    """Load and save again, with no step between."""
    config, _, engine, state = setup(*layout)
    step = load(source, state).step
    save(out, state, step=step, config=config)
    engine.destroy()


def tensors(folder) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    reader.check_model()
    return {key: reader.read(key) for key in reader.manifest.tensors}


@pytest.fixture(scope="module")
def sources(ranks, tmp_path_factory):
    """Every layout's checkpoints, and its losses and gradient norms after the save."""
    root = tmp_path_factory.mktemp("layouts")
    return {name: (root / name, ranks(world).run(uninterrupted, layout, root / name)[0]) for name, (world, *layout) in LAYOUTS.items()}


@pytest.mark.parametrize("target", LAYOUTS)
def test_every_layout_goes_on_from_every_layout(ranks, sources, tmp_path, target):
    """Losses and gradient norms to 1e-5 relative; weights, both moments and frozen weights to 1e-5 of the uninterrupted run's,
    and AdamW's own count of steps. On the layout itself: not a bit.

    Layouts add up in another order, which fp32 shows from the seventh digit on, 1e-7, and five steps carry on. Adam divides by the
    root of its second moment, so where a gradient is nearly nothing a weight may move by another share of the learning rate 1e-3: up
    to 1e-5 is 1 % of one such step. A moment left out, or put at another weight, moves weights by whole steps: a hundred times that.
    """
    world, *layout = LAYOUTS[target]
    results = ranks(world).run(interrupted, layout, {name: folder for name, (folder, _) in sources.items()}, tmp_path)[0]
    for name, source in sources.items():
        assert CheckpointReader(tmp_path / name).manifest.optimizer_step == BEFORE + AFTER
        assert_same_run(name, (tmp_path / name, results[name]), (source[0] / "end", source[1]), exactly=name == target)


def assert_same_run(name: str, ours, theirs, exactly: bool) -> None:
    """Two checkpoints with the losses and norms that led to them."""
    found, wanted = tensors(ours[0]), tensors(theirs[0])
    assert found.keys() == wanted.keys()
    if exactly:
        assert ours[1] == theirs[1]
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert one == pytest.approx(other, rel=1e-5), name
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, where=f"{name}, {key}": f"{where}: {text}")


def test_stages_of_unequal_depth_hold_the_same_checkpoint(ranks, tmp_path):
    """Weights and moments go through stages of other depths and other ZeRO stages without changing a bit."""
    ways = [(1, 2, 3, False, [1, 3]), (1, 2, 1, False, "even"), (2, 2, 3, False, [3, 1]), (1, 2, 2, False, "balanced")]
    ranks(4).run(uninterrupted, ways[0], tmp_path / "0")
    source, first = tmp_path / "0" / "end", tensors(tmp_path / "0" / "end")
    for number, way in enumerate(ways[1:], 1):
        ranks(4).run(carried, way, source, tmp_path / str(number))
        source = tmp_path / str(number)
        found = tensors(source)
        assert found.keys() == first.keys()
        assert all(torch.equal(found[key], first[key]) for key in first), way


ONE, TP2_PP2, TP2_PP2_ZERO3 = LAYOUTS["one process"], LAYOUTS["TP2 x PP2"], (4, 2, 2, 3)


PAIRS = [(ONE, TP2_PP2), (ONE, TP2_PP2_ZERO3), (TP2_PP2, ONE), (TP2_PP2_ZERO3, ONE), (TP2_PP2_ZERO3, TP2_PP2_ZERO3)]


@pytest.mark.parametrize("source, target", quick(PAIRS, [(ONE, TP2_PP2_ZERO3), (TP2_PP2, ONE)]), ids=str)
def test_tied_embeddings_are_stored_once_and_go_on(ranks, tmp_path, source, target):
    """Saved by one process and gone on with on TP2 x PP2, and the reverse; on the layout itself to the bit."""
    (world, *layout), (world_after, *layout_after) = source, target
    through = ranks(world).run(uninterrupted, [*layout, True], tmp_path)[0]
    assert not [key for key in tensors(tmp_path / "middle") if "output_layer" in key]
    results = ranks(world_after).run(interrupted, [*layout_after, True], {"tied": tmp_path}, tmp_path / "out")[0]
    assert_same_run("tied", (tmp_path / "out" / "tied", results["tied"]), (tmp_path / "end", through), exactly=source == target)

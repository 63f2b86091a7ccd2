"""Stages of unequal depth: the computed balance and the bubble, foretold and measured. Parity is tested in test_parity.py."""

import random
import time
from itertools import combinations

import pytest
import torch

from htc_megatron.config_io import load_zero
from htc_megatron.model.layout import ImageShape
from htc_megatron.model.mask import MaskRule, dense_mask
from htc_megatron.model.operations import sample_pairs
from htc_megatron.model.stages import Cost, Costs, balanced, describe_stages, layers_of_stages, part_costs, stage_costs
from htc_megatron.parallel.bubble import StageClock, idle_shares, measured_times
from tests.parity_worker import MIXED, local_batches, tiny_config
from tests.test_attention import build

PP = "parallel__pipeline_model_parallel_size"


def every_way(layers: int, stages: int):
    """All ways to give each stage at least one layer."""
    for cuts in combinations(range(1, layers), stages - 1):
        ends = (0, *cuts, layers)
        yield tuple(b - a for a, b in zip(ends, ends[1:], strict=False))


def slowest(costs: Costs, layers: tuple[int, ...]) -> float:
    return max(cost.total for cost in stage_costs(costs, layers))


def test_no_other_layout_has_a_faster_slowest_stage():
    """Against all layouts, for costs of every shape: towers and output layers from nothing to several layers' worth."""
    draw = random.Random(0)
    for _ in range(300):
        stages = draw.randint(1, 4)
        layers = draw.randint(stages, 9)
        layer = Cost(draw.uniform(0.5, 1.0), draw.uniform(0.0, 2.0))
        others = [Cost(share * layer.forward, share * layer.backward) for share in (draw.random(), 4 * draw.random(), 4 * draw.random())]
        costs = Costs(layer, *others)
        ours = balanced(costs, layers, stages)
        assert sum(ours) == layers and len(ours) == stages and min(ours) >= 1
        assert slowest(costs, ours) == pytest.approx(min(slowest(costs, way) for way in every_way(layers, stages)))


def test_stage_costs_add_up():
    """By hand: a layer costs 1 + 2, the last one 0.5 + 1, the tower 2 + 0, the output layer 0.1 + 0.2."""
    costs = Costs(Cost(1, 2), Cost(0.5, 1), Cost(2, 0), Cost(0.1, 0.2))
    assert stage_costs(costs, (1, 3)) == [Cost(3, 2), Cost(pytest.approx(2.6), pytest.approx(5.2))]
    assert stage_costs(costs, (2,)) == [Cost(pytest.approx(3.6), pytest.approx(3.2))]
    assert balanced(costs, 6, 2) == (2, 4)  # 8 and 10.8, where (3, 3) has 11 and 7.8
    assert balanced(costs, 7, 2) == (3, 4)  # 11 and 10.8


def test_the_tower_takes_layers_off_the_first_stage():
    """A frozen tower costs less than a trained one, which moves fewer layers; the discrete channel has none."""
    deep = {PP: 2, "model__backbone__num_layers": 40, "model__vision__num_layers": 40, "model__vision__hidden_size": 64}
    trained, frozen = (layers_of_stages(tiny_config(**deep, training__freeze=freeze)) for freeze in ([], ["vision"]))
    without = layers_of_stages(tiny_config(**deep, model__method__channels="discrete"))
    assert trained[0] < frozen[0] < without[0]
    known = layers_of_stages(tiny_config(**deep, training__freeze=["vision"], data__feature_cache="features"))
    assert frozen[0] < known[0]  # the tower hardly runs
    assert all(sum(layers) == 40 for layers in (trained, frozen, without))


def test_costs_follow_what_is_trained_and_recomputed():
    def costs(freeze: list[str], recompute: str = "none") -> Costs:
        return part_costs(tiny_config(training__freeze=freeze, parallel__recompute=recompute))

    trained = costs([])
    assert trained.layer.backward == 2 * trained.layer.forward
    passing = costs(["backbone"])
    assert passing.layer.backward == passing.layer.forward == trained.layer.forward
    again = costs([], "full")
    assert again.layer == Cost(trained.layer.forward, 3 * trained.layer.forward)
    assert again.last == trained.last  # the output layer is not recomputed
    frozen = costs(["vision", "projector", "anchors"])
    assert frozen.first == Cost(trained.first.forward, 0)
    assert trained.last_layer.forward < trained.layer.forward


@pytest.mark.parametrize("wanted, layers", [("even", (2, 2)), ([3, 1], (3, 1))])
def test_what_is_asked_for_is_taken(wanted, layers):
    assert layers_of_stages(tiny_config(**{PP: 2, "parallel__layers_per_stage": wanted})) == layers


@pytest.mark.parametrize("rule", [MaskRule(), MaskRule("full", "prefix"), MaskRule("none", "own"), MaskRule("none", "prefix")], ids=str)
def test_pairs_of_text_rows_are_those_of_the_mask(rule):
    """With one image, whose rows are all others: the pairs of both kinds against the dense mask."""
    shape = ImageShape(2, 5, 2)
    layout = build([[[3, 5]]], shape)
    length, start = int(layout.samples[0, 2]), int(layout.images[0, 1])
    allowed = dense_mask(layout, rule)[0, :length]
    image = torch.zeros(length, dtype=torch.bool)
    image[start : start + shape.length] = True
    assert sample_pairs(length, [start], shape, rule) == (int(allowed[~image].sum()), int(allowed[image].sum()))


# ---------------------------------------------------------------------------------------------------------- the bubble


@pytest.mark.parametrize("stages, micro_batches", [(1, 3), (2, 1), (2, 4), (4, 2), (4, 8), (8, 64)])
def test_equal_stages_have_the_known_bubble(stages, micro_batches):
    shares = idle_shares([(1.0, 2.0)] * stages, micro_batches)
    assert shares == pytest.approx([(stages - 1) / (micro_batches + stages - 1)] * stages)


def test_bubbles_replayed_by_hand():
    """Two stages, the first twice as slow, two micro-batches:

        first   F1 0-2, F2 2-4, waits to 5, B1 5-9, B2 9-13      busy 12 of 13
        second  waits to 2, F1 2-3, B1 3-5, F2 5-6, B2 6-8       busy 6 of 13
    and with all the work in the second, which the first then waits for: F1 0-0, F2 0-0, second F1 0-1, B1 1-3, F2 3-4, B2 4-6.
    """
    assert idle_shares([(2, 4), (1, 2)], 2) == pytest.approx([1 / 13, 7 / 13])
    assert idle_shares([(0, 0), (1, 2)], 2) == pytest.approx([1, 0])
    assert idle_shares([(1, 2), (1, 2), (2, 4)], 1) == pytest.approx([9 / 12, 9 / 12, 6 / 12])


def test_a_run_is_told_its_stages():
    config = tiny_config(**{PP: 2, "parallel__layers_per_stage": [3, 1]})
    first, last = (cost.total for cost in stage_costs(part_costs(config), (3, 1)))
    idle = idle_shares(stage_costs(part_costs(config), (3, 1)), 4)
    assert describe_stages(config, 4) == (
        f"pipeline: layers 3 | 1, computed cost {first / (first + last):.1%} | {last / (first + last):.1%}; 1F1B with 4 micro-batches "
        f"a step leaves stages idle for {sum(idle) / 2:.1%} of the passes, the slowest, stage 0, for {idle[0]:.1%}"
    )


def test_the_clock_counts_passes_and_not_messages():
    """As mcore 0.16.1 calls it."""
    clock = StageClock(torch.device("cpu"))
    for _ in range(2):
        clock("forward-backward", log_level=1).start(barrier=True)
        clock("forward-compute", log_level=2).start()
        time.sleep(0.02)
        clock("forward-compute").stop()
        clock("forward-recv", log_level=2).start()
        time.sleep(0.03)
        clock("forward-recv").stop()
        clock("backward-compute", log_level=2).start()
        clock("backward-compute").stop()
        clock("forward-backward").stop()
    busy, whole, _ = clock.read()
    assert busy >= 0.04 and whole - busy >= 0.06
    assert clock.read() == (0.0, 0.0, 0.0)


def measured(slow_stage: int, seconds: float) -> tuple[list[float], list[float]]:
    """Idle shares of one step of four micro-batches where each forward of one stage sleeps; and after an evaluation alone."""
    from htc_megatron.parallel import groups as process_groups
    from htc_megatron.training.build import build_engine
    from htc_megatron.training.step import evaluate, train_step

    config = tiny_config(**{PP: 2})
    groups = process_groups.initialise(config.parallel, 0)
    engine = build_engine(config, load_zero("zero1.json"), groups)
    batches = local_batches(config, 0, MIXED, groups)
    train_step(engine, batches, 0.0)  # the first is slower by what it allocates
    engine.clock.read()
    if groups.pp_rank == slow_stage:
        engine.module.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    train_step(engine, batches, 0.0)
    shares = measured_times(engine.clock, groups).idle_shares
    evaluate(engine, iter([batches]))
    after = measured_times(engine.clock, groups).idle_shares
    engine.destroy()
    return shares, after


@pytest.mark.parametrize("slow_stage", [0, 1])
def test_a_slow_stage_shows_as_the_others_idling(ranks, slow_stage):
    """Its sleep is its own work, so it is busy for most of the step and the other one waits."""
    first, second = ranks(2).run(measured, slow_stage, 0.5)
    assert first == second
    shares, after = first
    assert shares[slow_stage] < 0.5 < shares[1 - slow_stage]
    assert after == [0.0, 0.0]

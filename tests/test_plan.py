"""The planner: real modules counted without memory, memory beside that of real processes, and what it tells a user."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from htc_megatron.benchmarks.plan import rank_correlation
from htc_megatron.benchmarks.workload import num_parameters, workload_config
from htc_megatron.config_io import check, load_config, load_zero
from htc_megatron.model.stages import Work
from htc_megatron.parallel.support import Layout, refuse_untested
from htc_megatron.planner.hardware import hardware
from htc_megatron.planner.speed import speed_of
from htc_megatron.planner.trial import Counted
from htc_megatron.weights.table import weights
from tests import plan_worker
from tests.parity_worker import tiny_config

RECIPES = Path("pretrain/recipes")
INSTRUCT = str(RECIPES / "instruct.yaml")
PUBLISHED = {  # parameters, of the models' own checkpoints
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-34b": 33_743_970_304,
    "llama-70b": 68_976_648_192,
    "llama-405b": 405_853_388_800,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
}


def backbone(name: str) -> str:
    return str(RECIPES / "backbones" / f"{name}.yaml")


def test_there_is_a_size_for_every_backbone():
    assert {path.stem for path in (RECIPES / "backbones").glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_backbones_have_the_published_number_of_parameters(ranks, name):
    """And two rows more: the embedding's and the output's of <voco>."""
    config = load_config([INSTRUCT, backbone(name)])
    check(config)
    model = config.model
    beside = sum(math.prod(weight.shape) for weight in weights(model) if not weight.name.startswith("backbone."))
    counted = ranks(1).run(plan_worker.parameters, config, init=False)[0] - beside
    assert counted == PUBLISHED[name] + 2 * model.backbone.hidden_size


@pytest.mark.parametrize(("recompute", "freeze"), [("none", []), ("full", ["vision"])])
def test_a_few_layers_tell_of_all(ranks, recompute, freeze):
    """A stage of eight layers, worked out from few, has what the whole one has; the largest moment to one layer's temporaries."""
    config = workload_config(12e6, 1, 2, 1, "zero1.json", "fp32", 96, 2)
    config = replace(
        config, parallel=replace(config.parallel, recompute=recompute), training=replace(config.training, freeze=tuple(freeze))
    )
    for few, whole in ranks(1).run(plan_worker.few_and_all, config, 2, init=False)[0]:
        for name in ("trained", "frozen", "decayed", "largest", "unit", "kept"):
            assert getattr(few, name) == getattr(whole, name), name
        assert few.forward == pytest.approx(whole.forward, rel=0.05)
        assert few.backward == pytest.approx(whole.backward, rel=0.05)


def test_stages_of_a_large_world_hold_the_model_together(ranks):
    """1,024 ranks, PP 4: what the stages hold is the model, to the entry."""
    config = tiny_config(parallel__pipeline_model_parallel_size=4)
    assert ranks(1).run(plan_worker.summed, config, 1024, 1, init=False)[0] == num_parameters(config.model)


@pytest.mark.parametrize("layout", [Layout(dp=2, zero=3), Layout(pp=2, zero=2, recompute="selective")], ids=str)
def test_memory_is_that_of_real_processes(ranks, layout):
    config = workload_config(45e6, layout.tp, layout.pp, layout.dp, f"zero{layout.zero}.json", "fp32", 96, 2)
    config = replace(config, parallel=replace(config.parallel, recompute=layout.recompute))
    found = ranks(1).run(plan_worker.foretold, config, layout, init=False)[0]
    measured = [rank["peak_mib"] for rank in ranks(2).run("htc_megatron.benchmarks.scale:measure", config, layout, 0, 1, timeout=240)]
    of_stages = measured if layout.pp == 2 else [max(measured)]
    assert found == pytest.approx(of_stages, rel=0.1)


@pytest.mark.parametrize(
    "freeze, scatter_rounds, share",
    [((), 1, 5 / 4), ((), 2, 7 / 4), (("backbone",), 1, 1), (("backbone",), 2, 6 / 4)],
    ids=["trained", "trained, gloo", "frozen", "frozen, gloo"],
)
def test_what_sequence_parallelism_exchanges(freeze, scatter_rounds, share):
    """Beside TP's two all-reduces of two rounds: a gather and a scatter each way, and a gather more where weights have gradients."""
    machine = replace(hardware("h100-80g"), node_latency=0.0, scatter_rounds=scatter_rounds)
    exchanged = []
    for sequence_parallel in (False, True):
        config = workload_config(12e6, 2, 1, 1, "zero1.json", "fp32", 96, 2)
        config = replace(config, parallel=replace(config.parallel, sequence_parallel=sequence_parallel))
        config = replace(config, training=replace(config.training, freeze=freeze))
        layers, nothing = [config.model.backbone.num_layers], [Counted(0, 0, 0, 0, 0)]
        speed = speed_of(config, load_zero(config.zero), machine, 8, 2, layers, nothing, Work(96, 69, 20, (1500, 500), False, 1))
        exchanged.append(speed.exchange_s)
    assert exchanged[1] == pytest.approx(share * exchanged[0])


def test_405b_on_2048_gpus(ranks, tmp_path):
    """Planned in under a minute of processor time; what is written starts on that many ranks; every line fits."""
    written, listed = tmp_path / "plan.yaml", tmp_path / "plans.json"
    files = [INSTRUCT, backbone("llama-405b")]
    what = ("--config", *files, "--nodes", "256", "--gpu", "h100-80g", "--top", "2", "training.global_batch_size=2048")
    status, said, seconds = ranks(1).run(plan_worker.tool, *what, "--write", str(written), "--json", str(listed), init=False, timeout=300)[
        0
    ]
    assert status == 0, said
    assert seconds < 60
    plans = json.loads(listed.read_text())
    assert len(plans) == 2
    assert [plan["step_s"] for plan in plans] == sorted(plan["step_s"] for plan in plans)
    assert all(memory["peak"] < 80e9 for plan in plans for memory in plan["memory"])
    config = load_config([*files, str(written)], ["training.global_batch_size=2048"])
    check(config, 2048)
    refuse_untested(config, 2048, load_zero(config.zero)["zero_optimization"]["stage"])
    layout = plans[0]["layout"]
    assert config.parallel.pipeline_model_parallel_size == layout["pp"]
    assert config.zero == f"zero{layout['zero']}.json"


def test_too_little_memory_names_the_nearest_that_fits(ranks):
    what = ("--config", INSTRUCT, "--nodes", "1", "--gpus-per-node", "1", "--gpu", "a100-40g", "training.seq_length=1024")
    status, said, _ = ranks(1).run(plan_worker.tool, *what, init=False, timeout=300)[0]
    assert status == 2
    assert "plan: --gpu: got a100-40g x 1" in said and "the nearest that fits is --nodes " in said
    assert int(said.split("--nodes ")[1].split(":")[0]) > 1


def test_a_batch_that_no_layout_divides_names_the_nearest_nodes(ranks):
    what = ("--config", INSTRUCT, "--nodes", "7", "--gpus-per-node", "1")
    status, said, _ = ranks(1).run(plan_worker.tool, *what, "model.backbone.num_layers=6", init=False)[0]
    assert status == 2
    assert "--nodes: got 7 (7 ranks), for which there is no layout" in said and "the nearest that has one is --nodes 6" in said


def test_unknown_gpu_is_refused(ranks):
    status, said, _ = ranks(1).run(plan_worker.tool, "--config", INSTRUCT, "--nodes", "1", "--gpu", "h100", init=False)[0]
    assert status == 2 and "plan: --gpu: got h100, wanted one of a100-40g" in said


def test_rank_correlation_takes_noise_for_ties():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40], [0.0] * 4) == 1
    assert rank_correlation([1, 2, 3, 4], [40, 30, 20, 10], [0.0] * 4) == -1
    assert rank_correlation([1, 2, 3, 4], [10, 21, 20, 40], [0.1] * 4) == 1
    assert rank_correlation([1, 2, 3, 4], [10, 21, 20, 40], [0.01] * 4) < 1

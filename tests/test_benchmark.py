"""Benchmarks measure what they say they do."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel, LlamaForCausalLM

from htc_megatron.benchmarks.convert import measure_converting, write_synthetic
from htc_megatron.benchmarks.scale import layout_of, memory_fit, summary
from htc_megatron.benchmarks.train import products
from htc_megatron.benchmarks.workload import num_parameters, random_batch, sized_model, workload_config
from htc_megatron.config import ConfigError
from htc_megatron.config_io import check, load_zero
from htc_megatron.parallel.support import Layout
from tests.parity_worker import tiny_config

TOOL = Path(__file__).parent.parent / "tools" / "benchmark.py"


@pytest.mark.parametrize("parameters", [11e6, 45e6, 200e6, 7e9])
def test_models_come_near_the_wanted_size(parameters):
    assert num_parameters(sized_model(parameters)) == pytest.approx(parameters, rel=0.25)
    config = workload_config(parameters, 2, 2, 2, "zero1.json", "bf16", 128, 4)
    check(config, 8)
    batch = random_batch(config, 0, True)
    assert batch.num_supervised == 128 - 8 - config.model.tokens_per_image
    assert random_batch(config, 0, True, question=5).num_supervised == batch.num_supervised - 5


def test_a_size_out_of_reach_is_refused():
    with pytest.raises(ConfigError, match="parameters: got 1000, but the nearest"):
        sized_model(1000)


def measure_job(folder: Path, rounds: int) -> dict:
    from htc_megatron.benchmarks.save import measure_saving
    from htc_megatron.parallel import groups as process_groups

    config = tiny_config(training__micro_batch_size=1, training__global_batch_size=2)
    groups = process_groups.initialise(config.parallel, 0)
    return measure_saving(config, load_zero("zero3.json"), groups, folder, rounds, lambda sentence: None)


def test_what_saving_costs(ranks, tmp_path):
    """Sums are those of the parts, shares those of the medians, and the checkpoints are gone."""
    found = ranks(2).run(measure_job, tmp_path / "checkpoints", 3, timeout=240)[0]
    assert not (tmp_path / "checkpoints").exists()
    assert found["parameters"] == num_parameters(tiny_config().model) and found["checkpoint_bytes"] > 4 * found["parameters"]
    assert found["ranks"] == 2 and found["layout"]["zero_stage"] == 3 and len(found["rounds"]) == 3
    for one in found["rounds"]:
        assert min(one["undisturbed_s"], one["disturbed_s"], one["stall_s"], one["write_s"], one["blocking_s"]) > 0
        assert one["cost_s"] == pytest.approx(one["stall_s"] + one["disturbed_s"] - one["undisturbed_s"])
    middle = sorted(one["stall_s"] for one in found["rounds"])[1]
    assert found["stall_share"] == pytest.approx(middle / sorted(one["blocking_s"] for one in found["rounds"])[1])


def run_tool(*arguments: str) -> tuple[str, dict]:
    """What the tool prints, and what it writes as JSON."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, str(TOOL), *arguments, "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(file.read_text())


def test_attention_beside_its_peers():
    """At a small size: what is timed computes the dense mask's gradients, and ratios are those of the seconds."""
    shown, found = run_tool(
        "attention", "--patches", "12", "--more-patches", "48", "--text", "9", "--heads", "2", "--head-dim", "8", "--rounds", "3"
    )
    assert found["largest_difference"] < 1e-5 and found["ratios"].keys() == {"dense_over_ours", "causal_over_ours", "growth_over_linear"}
    of_rounds = sorted(a / b for a, b in zip(found["seconds"]["dense"], found["seconds"]["ours"], strict=True))
    assert found["ratios"]["dense_over_ours"] == pytest.approx(of_rounds[1]) and f"{of_rounds[1]:.3g}" in shown
    assert found["machine"]["torch"] == torch.__version__


def test_training_beside_its_peers():
    """At a small size: the peers have our loss and our gradients, so the same work is timed."""
    sizes = "--hidden 64 --layers 3 --head-dim 16 --vocabulary 301 --batch 2 --text 24 --question 6 --patch-side 3 --rounds 1"
    _, found = run_tool("train", *sizes.split())
    assert found["difference"]["loss"] < 1e-5 and found["difference"]["mcore_loss"] < 1e-5 and found["difference"]["gradients"] < 1e-4
    assert found["seconds"].keys() == {"transformers", "transformers_kept", "mcore"}
    assert all(pair.keys() == {"ours", name} for name, pair in found["seconds"].items())
    assert all(seconds > 0 for pair in found["seconds"].values() for several in pair.values() for seconds in several)
    assert {"peer_over_ours", "peer_kept_over_ours", "peer_memory_over_ours"} <= found["ratios"].keys()


def test_products_of_linear_layers_are_counted():
    """Every way they are called, and no others."""
    a, b, c, found = torch.ones(2, 3), torch.ones(3, 5), torch.ones(2, 5), {}
    with products(found, "all"):
        torch.mm(a, b)
        torch.mm(a, b, out=torch.empty(2, 5))
        torch.addmm(c, a, b)
        c.addmm_(a, b)
        torch.bmm(a[None], b[None])
    assert found == {"all": 4 * 2 * 2 * 3 * 5}


def test_the_gpu_benchmark_on_cpu():
    """The script for one GPU, whole, at a size that runs here: correctness, attention, a step and its peer."""
    shown, found = run_tool("gpu", "--sizes", "tiny", "--text", "16", "--rounds", "1")
    assert found["errors"]["fp32"]["gradients"] < 1e-6 < found["errors"]["bf16"]["gradients"] < 2**-4
    assert found["steps"]["tiny"]["seconds"].keys() == {"ours", "transformers"} and "MFU" in shown
    assert {"attention_dense_over_ours", "tiny_peer_over_ours", "tiny_peer_memory_over_ours"} <= found["ratios"].keys()


@pytest.mark.slow
def test_the_tool(tmp_path):
    """One round on the smallest model: the table on stdout, the same figures in the file."""
    command = [sys.executable, str(TOOL), "save", "--parameters", "11e6", "--rounds", "1", "--folder", str(tmp_path), "--json"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run([*command, str(tmp_path / "found.json")], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["command"] == "save" and f"{found['blocking_s']:.3f} s" in done.stdout and f"{found['cost_share']:.1%}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    refused = subprocess.run([sys.executable, str(TOOL), "save", "--parameters", "7"], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2 and "benchmark: parameters: got 7" in refused.stderr


@pytest.mark.slow
def test_what_converting_costs(tmp_path):
    """Synthetic files are what transformers loads, whole; the figures are of programs that ran, and all files are gone."""
    write_synthetic(tmp_path / "files", "tiny")
    for kind, name in ((LlamaForCausalLM, "llama"), (CLIPVisionModel, "clip")):
        _, info = kind.from_pretrained(tmp_path / "files" / name, output_loading_info=True)
        assert not any(info.values()), info
    found = measure_converting(TOOL.with_name("convert.py"), tmp_path / "bench", "tiny", 1, lambda sentence: None)
    assert not (tmp_path / "bench").exists()
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["peak_resident_bytes"]["import"] > 10 * found["peak_resident_bytes"]["cp"] > 0
    assert found["import_over_cp"] == pytest.approx(found["seconds"]["import"] / found["seconds"]["cp"])
    assert found["source_bytes"] > found["exported_bytes"] > 100_000


def test_memory_is_fitted_over_data_parallel_ranks():
    """60 / DP + 7 exactly, and as far off as one peak that is not on the curve; ranks of a layout count by their largest."""
    assert memory_fit([1, 2, 4], [67.0, 37.0, 22.0]) == pytest.approx((60, 7, 0), abs=1e-9)
    found = []
    for dp, peak in ((1, 67.0), (2, 37.0), (4, 30.0)):
        ranks = [{"held_mib": 5.0, "peak_mib": peak - rank, "step_s": [0.5, 0.25, 1.0]} for rank in range(dp)]
        found.append((Layout(dp=dp, zero=3), ranks))
    result = summary(found, 100, 10)
    assert 0.05 < result.ratios["memory_residual_tp1_pp1_zero3"] < 0.2
    assert result.ratios["memory_dp4_over_dp1_tp1_pp1_zero3"] == pytest.approx(30 / 67)
    assert [one["tokens_per_s"] for one in result.figures["layouts"]] == [200.0, 400.0, 800.0]
    assert layout_of("1,2,2,3") == Layout(pp=2, dp=2, zero=3)

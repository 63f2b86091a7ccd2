"""The paper in small: which steps there are and what they wait for, and the weights that a model starts from."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from htc_megatron.checkpoint import CheckpointReader, CheckpointWriter
from htc_megatron.config import ConfigError
from htc_megatron.config_io import load_config, to_dict
from htc_megatron.model.initialisation import initial_value
from htc_megatron.model.mgvq import build_mgvq, load_codebook, save_mgvq
from htc_megatron.weights import weights

FOLDER = Path(__file__).parent.parent / "examples" / "paper"
sys.path.insert(0, str(FOLDER))

import report  # noqa: E402
import run  # noqa: E402
from start import write_start  # noqa: E402


def options(out: Path, *only: str, seeds: int = 1) -> argparse.Namespace:
    return argparse.Namespace(out=out, only=[*only], seeds=seeds, train_pictures=10, test_pictures=5)


def test_every_model_is_planned_and_reported(tmp_path):
    planned = {name.split("/")[0] for name in run.plan(options(tmp_path)) if name.endswith("/answers")}
    too_many = {"num_voco_128", "num_voco_192"}  # of 64 patches
    assert planned == {path.stem for path in run.MODELS.glob("*.yaml")} - too_many
    assert planned == set(report.MAIN).union(*report.ABLATIONS.values())


def test_what_steps_wait_for(tmp_path):
    plan = run.plan(options(tmp_path, "lower", "mgvq_groups_4"))
    assert {name: step.needs for name, step in plan.items() if not name.endswith("/answers")} == {
        "scenes": (),
        "captions": ("scenes",),
        "stage1/0": ("captions",),
        "mgvq/g8c16384": ("scenes",),
        "codes/g8c16384": ("mgvq/g8c16384",),
        "mgvq/g4c16384": ("scenes",),
        "codes/g4c16384": ("mgvq/g4c16384",),
        "upper/0": ("stage1/0", "codes/g8c16384"),
        "lower/0": ("upper/0", "codes/g8c16384"),
        "mgvq_groups_4/0": ("stage1/0", "codes/g4c16384"),
    }
    assert plan["lower/0/answers"].needs == ("lower/0",)


def test_models_differ_in_nothing_but_their_files(tmp_path):
    """Steps, seeds and data are the same; only what a model's file says, where it is kept, and the rows' length is another: 512 tokens
    for the upper bound's 64 an image, and for others so many that they hold as many conversations of 80 tokens with their images."""
    plan = run.plan(options(tmp_path, "main", seeds=2))
    for seed in (0, 1):
        found = [to_dict(plan[f"{name}/{seed}"].arguments[0]) for name in run.MAIN if name != "lower"]
        for config in found:
            assert config["training"]["seed"] == config["data"]["seed"] == seed
            for key in ("model", "init_from", "output_dir"):
                del config[key]
        lengths = [config["training"].pop("seq_length") for config in found]
        assert dict(zip([name for name in run.MAIN if name != "lower"], lengths, strict=True)) == {
            "upper": 512,
            "qformer": 288,
            "average": 288,
            "voco_llama": 516,
            "discrete": 302,
            "htc": 530,
        }
        assert all(config == found[0] for config in found)


def test_names_that_are_not_known_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--only: got nothing_such, wanted main, ablations or some of upper"):
        run.plan(options(tmp_path, "nothing_such"))


def test_results_of_other_settings_are_refused(tmp_path):
    plan = run.plan(options(tmp_path, "htc"))
    step = plan["htc/0/answers"]
    step.result.parent.mkdir(parents=True)
    config = to_dict(step.arguments[0])
    step.result.write_text(json.dumps({"config": config}))
    run.check_finished(plan)
    config["training"]["train_iters"] += 1
    step.result.write_text(json.dumps({"config": config}))
    with pytest.raises(ConfigError, match="is of other settings than these"):
        run.check_finished(plan)


def test_a_start_has_the_weights_of_stage_1_and_its_own_new_ones(tmp_path):
    torch.manual_seed(0)
    upper = load_config(run.STAGE1, ["training.seed=5"])
    with CheckpointWriter(tmp_path / "stage1", upper) as writer:
        for weight in weights(upper.model):
            writer.add(weight.name, torch.randn(weight.shape))
    save_mgvq(build_mgvq(upper.model.mgvq), upper.model.mgvq, tmp_path / "mgvq.safetensors")
    mgvq = f"mgvq_checkpoint={tmp_path / 'mgvq.safetensors'}"
    config = load_config([FOLDER / "base.yaml", run.MODELS / "htc.yaml"], ["training.seed=7", mgvq])
    write_start(tmp_path / "stage1", config, tmp_path / "start")
    before, after = CheckpointReader(tmp_path / "stage1"), CheckpointReader(tmp_path / "start")
    new = {weight.name: weight for weight in weights(config.model) if weight.name not in before.names}
    assert all(torch.equal(after.tensor(name), before.tensor(name)) for name in before.names)
    assert new.keys() == {f"frontend.{part}" for part in ("voco.weight", "codebook.weight")} | {
        f"frontend.anchors.{linear}.{kind}" for linear in ("fc1", "fc2") for kind in ("weight", "bias")
    }
    codebook = load_codebook(config.mgvq_checkpoint, config.model.mgvq)
    for name, weight in new.items():
        wanted = codebook if name == "frontend.codebook.weight" else initial_value(weight, 7, 0, 1)
        assert torch.equal(after.tensor(name), wanted)

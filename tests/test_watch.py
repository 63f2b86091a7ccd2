"""A run as it is watched: its status file through all of its life, the figures in TensorBoard, the rank that is slow."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from htc_megatron.cluster import status
from htc_megatron.parallel import progress
from htc_megatron.parallel.bubble import Times
from htc_megatron.training.logger import Logger
from tests.train_worker import entry_point, train
from tests.training_tiny import make_run

TOOL = Path(__file__).parent.parent / "tools" / "status.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def slowed(yaml: str, overrides: list[str], slow: int, seconds: float) -> tuple[list[tuple[int, float, float]], float]:
    """`train` where one rank computes longer in each forward of its stage; and the seconds that the watchdog compares."""

    def before(trainer):
        if int(os.environ["RANK"]) == slow and trainer.step_number == 0:
            trainer.engine.module.register_forward_pre_hook(lambda *_: time.sleep(seconds))

    computed = progress.now.computed
    return train(yaml, overrides, before), progress.now.computed - computed


@pytest.mark.parametrize(
    "world, layout, slow",
    [(2, ["parallel.tensor_model_parallel_size=2"], 1), (4, ["parallel.pipeline_model_parallel_size=2"], 3), (2, ["zero=zero3.json"], 0)],
    ids=["TP 2", "PP 2 x DP 2", "DP 2, ZeRO-3"],
)
def test_the_slow_rank_is_named(ranks, run, tmp_path, world, layout, slow):
    """Though the others of its group take as long, as they wait for it. What is computed is not changed by it."""
    common = [*layout, "training.train_iters=3", "training.global_batch_size=4", "training.log_interval=3"]
    quiet = ranks(world).run(train, str(run), [*common, f"output_dir={tmp_path}/quiet"])[0]
    found, computed = zip(*ranks(world).run(slowed, str(run), [*common, f"output_dir={tmp_path}/slow"], slow, 0.3), strict=True)
    assert found[0] == quiet
    assert max(computed) == computed[slow]  # the same for the watchdog
    figures = scalars(tmp_path / "slow")
    assert figures["ranks/slowest"] == [slow]
    assert figures["ranks/slowest_over_median"][0] > 1.2
    said = status.read(tmp_path / "slow")
    assert said["slowest_rank"]["rank"] == slow and said["slowest_rank"]["host"]
    if "pipeline" in layout[0]:
        stages = [figures[f"pipeline/seconds_stage_{stage}"][0] for stage in (0, 1)]
        assert stages[1] > stages[0] > 0 and stages[1] > 0.3
        assert said["bubble"] == pytest.approx(figures["pipeline/idle_share"][0], abs=1e-3)


def test_times_by_hand():
    """Two stages of two ranks: shares by the longest schedule, the slowest by its own stage's median."""
    times = Times(stages=[0, 1, 0, 1], busy=[4.0, 8.0, 4.0, 8.0], whole=[10.0, 10.0, 9.0, 10.0], own=[2.0, 6.0, 4.0, 7.0])
    assert times.idle_shares == pytest.approx([0.6, 0.2]) and times.of_stage(1) == 8.0
    assert times.slowest == (2, 2.0)


def life(arguments: list[str]) -> tuple[int, list[dict]]:
    """A run by its entry point in one process, and what its status file said after each change."""
    said, update = [], status.StatusFile.update

    def noted(self, **more):
        update(self, **more)
        said.append(json.loads(self.path.read_text()))

    with mock.patch.object(status.StatusFile, "update", noted):
        code, _, _ = entry_point(arguments, 1)
    return code, said


def fail_at_step(arguments: list[str], step: int) -> int:
    def step_fails(self, number, *args):
        if number == step:
            raise ValueError("a test's own error")

    with mock.patch.object(Logger, "step", step_fails):
        return entry_point(arguments, 1)[0]


def test_the_status_of_a_life(ranks, run, tmp_path):
    """Starting, training, evaluating, saving, finished; or failed, with the sentence; and the life after that counts as a restart."""
    arguments = ["--config", str(run), f"output_dir={tmp_path}/run", "training.train_iters=2", "training.eval_interval=2"]
    arguments += ["training.eval_iters=1", "training.async_save=false", "training.save_interval=1"]
    assert ranks(1).run(fail_at_step, arguments, 2, init=False) == [1]
    failed = status.read(tmp_path / "run")
    assert failed["state"] == "failed" and failed["message"] == "a test's own error"
    code, said = ranks(1).run(life, arguments, init=False)[0]
    assert code == 0
    states = [one["state"] for one in said]
    order = [state for i, state in enumerate(states) if i == 0 or states[i - 1] != state]
    assert order == ["starting", "training", "evaluating", "training", "saving", "training", "finished"]
    last = said[-1]
    assert last["step"] == last["train_iters"] == 2 and last["restarts"] == 1
    assert last["checkpoint"].endswith("step_00000002") and last["message"] == ""
    assert last["loss"] == pytest.approx(scalars(tmp_path / "run")["train/loss"][-1], rel=1e-6)
    assert scalars(tmp_path / "run")["run/restarts"][-1] == 1


def write(folder: Path, age: float, end: int | None = None, **more: object) -> str:
    folder.mkdir()
    said = {"state": "training", "step": 30, "train_iters": 90, "loss": 2.5, "seconds_per_step": 4.0, "host": "a"}
    (folder / status.FILE).write_text(json.dumps(said | {"updated": time.time() - age} | more))
    if end is not None:
        (folder / status.EXIT_FILE).write_text(f"{end}\n")
    return str(folder)


def test_the_tool(tmp_path):
    runs = {
        "runs": write(tmp_path / "runs", 1),
        "slow": write(tmp_path / "slow", 900, seconds_per_step=100.0),  # its steps take long
        "stopped": write(tmp_path / "stopped", 7200, 75, message="step 30: asked to stop by SIGUSR1"),
    }
    done = subprocess.run([sys.executable, str(TOOL), *runs.values()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{runs['runs']}: training, step 30/90, loss 2.5000, 4.00 s/step, 4 min to go")
    assert "SILENT" not in lines[1]
    assert "stopped, step 30/90" in lines[2] and lines[2].endswith(": step 30: asked to stop by SIGUSR1")
    bad = {
        "silent": write(tmp_path / "silent", 720),
        "killed": write(tmp_path / "killed", 20, 70),  # its last words are of training, but a watchdog has ended it
        "none": str(tmp_path / "none"),
    }
    done = subprocess.run([sys.executable, str(TOOL), *bad.values(), "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    found = {one["output_dir"]: one for one in json.loads(done.stdout)}
    assert found[bad["silent"]]["silent_s"] == pytest.approx(720, abs=60) and found[bad["killed"]]["state"] == "fault"
    assert found[bad["none"]]["state"] == "unknown"
    assert "SILENT for 12 min" in status.line(bad["silent"], status.read(bad["silent"]))


def test_neither_the_tool_nor_the_first_lines_of_a_run_wait_for_torch():
    """A signal that comes while torch is being imported is heard."""
    code = "import sys, htc_megatron.cluster.status, htc_megatron.training.life; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "training"}', '{"updated": "today"}'])
def test_a_status_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / status.FILE).write_text(text)
    assert status.read(tmp_path) is None


def test_a_disk_that_takes_no_writes_costs_the_status_alone(tmp_path):
    (tmp_path / "file").write_text("")
    status.StatusFile(tmp_path / "file" / "run").update(state="training")
    assert status.read(tmp_path / "file" / "run") is None


@pytest.mark.parametrize("seconds, words", [(40, "40 s"), (720, "12 min"), (12000, "3 h 20 min"), (187200, "2 d 4 h")])
def test_durations(seconds, words):
    assert status.in_words(seconds) == words

"""A job's life: how it stops, the status it ends with, how it goes on and when it is given up."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from htc_megatron.checkpoint import CheckpointError, latest
from htc_megatron.cluster.status import FAILED, FAULT, FINISHED, REFUSED, STOPPED
from htc_megatron.config import ConfigError, LifeConfig, RunConfig
from htc_megatron.config_io import from_dict, to_dict
from htc_megatron.training.life import ExitStatus, Fault, Interrupt, Lives, NoProgress, Stopped, status_of
from tests.life_worker import stopped_run
from tests.train_worker import entry_point, train
from tests.training_tiny import make_run

PP2 = ["parallel.pipeline_model_parallel_size=2", "training.global_batch_size=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(ranks, run, tmp_path_factory) -> tuple[list[str], list]:
    """Overrides of a run on PP 2 and what its steps give."""
    common = [*PP2, "training.train_iters=5", "training.eval_interval=2", "training.eval_iters=2"]
    return common, ranks(2).run(train, str(run), [*common, f"output_dir={tmp_path_factory.mktemp('whole')}"])[0]


@pytest.mark.parametrize(
    "where, number, at",
    [("train", signal.SIGUSR1, 3), ("evaluate", signal.SIGTERM, 6), ("data", signal.SIGUSR1, 3)],
)
def test_a_signal_to_one_rank_stops_all_at_one_step(ranks, run, whole, tmp_path, where, number, at):
    """In a step, in an evaluation or before the data is there: all ranks save, end with 75, and the next life goes on bit for bit."""
    common, expected = whole
    arguments = [*common, f"output_dir={tmp_path}/stopped"]
    found = ranks(2).run(stopped_run, ["--config", str(run), *arguments], 1, number, where, at)
    assert [status for status, _ in found] == [STOPPED] * 2
    match = re.search(r"pretrain_htc: step (\d): asked to stop by .*; the run goes on from .*step_0000000(\d)", found[0][1])
    assert match and match[1] == match[2], found[0][1]
    step = int(match[1])
    assert 0 < step < 5
    if where == "train":
        assert step == at  # the one that was under way
    assert (tmp_path / "stopped" / "exit_status").read_text() == f"{STOPPED}\n"
    assert latest(tmp_path / "stopped" / "checkpoints").name == f"step_{step:08d}"
    assert ranks(2).run(train, str(run), arguments)[0] == expected[step:]


def test_before_there_is_anything_to_save_a_signal_ends_the_process(tmp_path):
    """Also while its main thread waits inside a library, where no Python runs."""
    code = (
        "import sys, threading, signal\n"
        "from htc_megatron.training.life import ExitStatus, Interrupt\n"
        "status = ExitStatus()\n"
        "status.belongs_to(sys.argv[1], True)\n"
        "with Interrupt(status):\n"
        "    print('ready', flush=True)\n"
        "    held = threading.Lock()\n"
        "    held.acquire()\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n"
        "    import ctypes\n"
        "    ctypes.CDLL(None).sleep(1)\n"
        "    while True:\n"
        "        ctypes.CDLL(None).sigsuspend(ctypes.create_string_buffer(128))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == STOPPED
    assert (tmp_path / "out" / "exit_status").read_text() == f"{STOPPED}\n"


def test_what_ends_the_time(tmp_path):
    interrupt = Interrupt()
    assert interrupt.reason == ""
    interrupt.limit(LifeConfig(time_limit_s=1000.0), {})
    assert interrupt.reason == ""
    interrupt.began -= 2000
    interrupt.limit(LifeConfig(time_limit_s=1000.0), {})
    assert interrupt.reason == "life.time_limit_s, 1000"
    now = int(time.time())
    for end, begin, margin, due in ((250, -10000, 300, True), (350, -10000, 300, False), (100, -100, 300, False), (40, -160, 300, True)):
        interrupt = Interrupt()
        times = {"SLURM_JOB_END_TIME": str(now + end), "SLURM_JOB_START_TIME": str(now + begin)}
        interrupt.limit(LifeConfig(end_margin_s=margin), times)
        assert bool(interrupt.reason) == due, (end, begin)
    interrupt = Interrupt()
    interrupt.limit(LifeConfig(end_margin_s=0.0), {"SLURM_JOB_END_TIME": str(now)})
    assert interrupt.reason == ""


def test_a_configuration_from_before_is_one_with_the_defaults():
    """So checkpoints that older versions wrote are read."""
    tree = to_dict(RunConfig())
    del tree["life"], tree["faults"]
    assert from_dict(tree) == RunConfig()


@pytest.mark.parametrize(
    "error, status",
    [
        (ConfigError("a"), REFUSED),
        (NoProgress("a"), FAILED),
        (CheckpointError("does not fit"), REFUSED),
        (Fault("a disk is lost"), FAULT),
        (torch.distributed.DistBackendError("NCCL"), FAULT),
        (OSError(5, "Input/output error"), FAULT),
        (torch.OutOfMemoryError("CUDA out of memory"), FAILED),
        (TypeError("a program's own"), FAILED),
        (Stopped("a"), STOPPED),
    ],
)
def test_statuses_of_errors(error, status):
    assert status_of(error) == status


def test_the_first_status_stays(tmp_path, monkeypatch):
    status = ExitStatus()
    status.belongs_to(tmp_path / "out", True)
    status.write(REFUSED)
    assert not (tmp_path / "out").exists()  # a refused run leaves nothing behind
    status.write(FAULT)
    status.write(STOPPED)
    assert (tmp_path / "out" / "exit_status").read_text() == "70\n"
    other = ExitStatus()
    other.belongs_to(tmp_path / "out", False)
    other.write(FAILED)
    assert (tmp_path / "out" / "exit_status").read_text() == "70\n"
    ExitStatus().belongs_to(tmp_path / "out", True)  # the next life
    assert not (tmp_path / "out" / "exit_status").exists()
    monkeypatch.setenv("HTC_EXIT_STATUS", str(tmp_path / "named"))
    status = ExitStatus()
    status.write(REFUSED)  # known before any configuration is
    assert (tmp_path / "named").read_text() == "2\n"


def test_lives_without_progress_are_bounded(tmp_path):
    lives = Lives(tmp_path)
    assert [lives.begin(0, 2) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(NoProgress, match=r"step 0: the run has begun 3 times there .* is 2: .*restarts.json"):
        lives.begin(0, 2)
    assert lives.begin(10, 2) == 3  # it got on
    assert [life["step"] for life in lives.read()] == [0, 0, 0, 10]
    (tmp_path / "restarts.json").write_text("{")
    assert lives.begin(10, 2) == 0
    lives.finish()
    assert lives.read() == []


def test_a_run_that_never_gets_on_is_given_up(ranks, run, tmp_path):
    """Through the entry point: the bound's own status and sentence, and no rank is left waiting for the one that keeps count."""
    arguments = ["--config", str(run), f"output_dir={tmp_path}/out", "life.max_restarts_without_progress=0"]
    Lives(tmp_path / "out").begin(0, 0)
    found = ranks(2).run(entry_point, [*arguments, "training.global_batch_size=4"], 2, init=False, timeout=60)
    assert [(status, has_group) for status, _, has_group in found] == [(FAILED, False)] * 2
    assert "has begun 1 times there without getting on" in found[0][1]
    assert (tmp_path / "out" / "exit_status").read_text() == f"{FAILED}\n"
    Lives(tmp_path / "out").finish()
    ((status, errors, _),) = ranks(1).run(entry_point, [*arguments, "training.train_iters=1"], 1, init=False)
    assert status == FINISHED, errors
    assert (tmp_path / "out" / "exit_status").read_text() == f"{FINISHED}\n"


def test_a_job_goes_on_on_fewer_ranks_with_its_batch(ranks, run, whole, tmp_path):
    """DP 2 stopped by its time, resumed by one process: the global batch and the order stay, so the losses do, to 1e-5."""
    overrides = ["training.global_batch_size=4", "training.train_iters=5", f"output_dir={tmp_path}/out"]
    arguments = ["--config", str(run), *overrides]
    found = ranks(2).run(stopped_run, arguments, 1, signal.SIGUSR1, "train", 2)
    assert [status for status, _ in found] == [STOPPED] * 2
    rest = ranks(1).run(train, str(run), overrides)[0]
    for (step, *ours), (wanted, *theirs) in zip(rest, whole[1][2:], strict=True):
        assert step == wanted and ours == pytest.approx(theirs, rel=1e-5)

"""The launcher's job on a real SLURM with two virtual nodes: tests/slurm_cluster.py."""

import math
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from htc_megatron.checkpoint import latest
from tests.slurm_cluster import SlurmCluster, missing
from tests.train_worker import ENTRY, train
from tests.training_tiny import make_run

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
LAUNCH = ENTRY.parent.parent / "tools" / "launch.py"
STEPS = 24
RUN = [f"training.train_iters={STEPS}", "training.save_interval=2"]


def ranks_of(output_dir: Path) -> list[psutil.Process]:
    """The processes that train a run, by the node they are on."""
    found = {}
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if command[:1] == [sys.executable] and str(ENTRY) in command and str(output_dir / "job.yaml") in command:
                found[process.environ()["SLURMD_NODENAME"]] = process
        except (psutil.Error, KeyError):
            continue
    return [found[node] for node in sorted(found)]


def step_of(output_dir: Path) -> int:
    """The last step that the progress bar shows, over all lives."""
    text = "".join(path.read_text(errors="replace") for path in (output_dir / "logs").glob("*-node0-*.log"))
    return int((re.findall(rf"(\d+)/{STEPS} \[", text) or ["0"])[-1])


@contextmanager
def standing_still(processes: list[psutil.Process]):
    """Stopped, not ended: what is waited for meanwhile costs no processor time and no steps."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            if process.is_running():
                process.send_signal(signal.SIGCONT)


def end_soon(cluster: SlurmCluster, job: str) -> None:
    """Give a running job a time limit that ends in 40 to 100 seconds: SLURM counts in minutes."""
    hours, minutes, seconds = map(int, cluster.job(job)["RunTime"].split(":"))
    elapsed = 3600 * hours + 60 * minutes + seconds
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={math.ceil((elapsed + 40) / 60)}")


def test_a_job_outlives_its_time_limit_and_a_lost_node(ranks, tmp_path):
    """Three lives of one job. The first is signalled by SLURM before its time limit, saves and is queued again; the second goes on with
    the same nodes, bit for bit, until one of them is drained and its rank dies; the third goes on with the other node alone."""
    run = make_run(tmp_path)
    output_dir = tmp_path / "job"
    with SlurmCluster(nodes=2) as cluster:
        cluster.shown.append(output_dir / "logs")
        options = ["--nodes", "1-2", "--cpu-ranks-per-node", "1", "--time", "30", "--signal-before", "75", "--min-free-gib", "0.1"]
        command = [sys.executable, str(LAUNCH), "--config", str(run), *options, *RUN, f"output_dir={output_dir}"]
        environment = cluster.environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        job = re.search(r"submitted as job (\d+)", done.stdout)[1]
        log = output_dir / "logs" / f"htc-job-{job}.log"

        cluster.wait(lambda: step_of(output_dir) >= 3, "step 3", 200)
        with standing_still(ranks_of(output_dir)):
            end_soon(cluster, job)
            expected = ranks(2).run(train, str(run), [*RUN, f"output_dir={tmp_path}/whole"])[0]
            cluster.wait(lambda: "asked to save and stop" in log.read_text(), "SLURM's signal", 100)
        cluster.wait(lambda: "life 1: stopped on request, with a checkpoint; the job is queued again" in log.read_text(), "a save", 60)
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # or every later life would be signalled as soon as this one
        stopped_at = int(latest(output_dir / "checkpoints").name.removeprefix("step_"))
        assert 3 <= stopped_at < STEPS - 6
        assert (output_dir / "exit_status").read_text() == "75\n"

        cluster.wait(lambda: step_of(output_dir) >= stopped_at + 3, f"step {stopped_at + 3}", 200)
        assert "life 2: 2 nodes" in log.read_text()
        cluster.run("scontrol", "update", f"NodeName={cluster.nodes[1]}", "State=DRAIN", "Reason=test")
        ranks_of(output_dir)[1].kill()
        cluster.wait(lambda: "life 2: a fault" in log.read_text(), "the end of the second life", 100)
        assert (output_dir / "exit_status").read_text() == "70\n"
        lost_at = int(latest(output_dir / "checkpoints").name.removeprefix("step_"))
        assert stopped_at < lost_at < STEPS
        cluster.wait(lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the end of the job", 200)
        shown = cluster.job(job)
        assert (shown["JobState"], shown["Restarts"], shown["NodeList"]) == ("COMPLETED", "2", cluster.nodes[0]), cluster.logs()
    assert "life 3: 1 nodes" in log.read_text() and log.read_text().count("the run is finished") == 1
    assert (output_dir / "exit_status").read_text() == "0\n"

    events = EventAccumulator(str(output_dir / "tensorboard")).Reload().Scalars("train/loss")
    losses, wanted = {event.step: event.value for event in events}, {step: float(np.float32(loss)) for step, loss, _ in expected}
    assert list(losses) == list(wanted) == list(range(1, STEPS + 1))
    assert [losses[step] for step in range(1, lost_at + 1)] == [wanted[step] for step in range(1, lost_at + 1)]
    assert [losses[step] for step in wanted] == pytest.approx(list(wanted.values()), rel=1e-5)

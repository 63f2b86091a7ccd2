"""A rank that dies, stops, hangs or is slow is named, with what it was at."""

import json
import re
import signal
import time
from pathlib import Path

import pytest

from htc_megatron.cluster.status import FAULT
from htc_megatron.config import LifeConfig
from htc_megatron.parallel import progress
from htc_megatron.parallel.support import Layout
from htc_megatron.training.watchdog import SILENT, SLOW_STEPS, Ranks

LIMITS = LifeConfig(heartbeat_limit_s=10.0, hang_limit_s=20.0, slow_factor=2.0)


class Clock:
    """Stands for time.monotonic."""

    def __init__(self, monkeypatch):
        self.moment = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.moment)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def said(beat: int, count: int = 0, at: str = "forward of step 3", waiting: bool = False, **more) -> dict:
    return {"beat": beat, "count": count, "at": at, "waiting": waiting, "host": "n1", "stage": 0, "step": 1, "computed": 0.0} | more


def test_a_silent_rank_is_named(clock):
    ranks = Ranks(3, LIMITS, 1.0)
    for beat in range(9):
        clock.moment += 1
        for rank in (0, 1, 2) if beat < 2 else (0, 2):
            ranks.hear(rank, said(beat, beat))
        ranks.hear(1, ranks.said[1])  # what the store still holds of it
    assert ranks.verdict() == ""
    clock.moment += 4
    for rank in (0, 2):
        ranks.hear(rank, said(99, 99))
    assert ranks.verdict() == "no sign of life for 11.0 s from rank 1 on n1, at last in forward of step 3"
    ranks.hear(1, ranks.said[1] | {"done": True})
    assert ranks.verdict() == ""  # it left in order


def test_where_one_has_lost_a_peer_the_silent_one_is_named_at_once(clock):
    ranks = Ranks(2, LIMITS, 1.0)
    for rank in (0, 1):
        ranks.hear(rank, said(1))
    clock.moment += SILENT + 0.5
    ranks.hear(0, said(2))
    assert ranks.verdict() == ""
    ranks.hear(0, said(3, error="RuntimeError: Connection closed by peer"))
    assert ranks.verdict().startswith("no sign of life for 4.5 s from rank 1 on n1")


def test_a_hang_names_who_does_not_wait(clock):
    ranks = Ranks(3, LIMITS, 1.0)
    for beat in range(22):
        clock.moment += 1
        ranks.hear(0, said(beat, 5, "backward of step 3, in all_reduce", True))
        ranks.hear(1, said(beat, 7, "data of step 3"))
        ranks.hear(2, said(beat, beat if beat < 10 else 10, "backward-recv of step 3", True))
        if beat < 20:
            assert ranks.verdict() == "", beat  # one of them came forward a moment ago
    clock.moment += 10
    for rank in range(3):
        ranks.hear(rank, ranks.said[rank] | {"beat": 99})
    assert ranks.verdict() == "no rank has come forward for 21.0 s; not waiting for others: rank 1 on n1 in data of step 3"


def test_a_slow_rank_is_named_within_its_stage(clock):
    """Stages differ by nature; the time is that of the steps since the last comparison."""
    ranks = Ranks(6, LIMITS, 1.0)
    speeds = [1.0, 1.1, 2.5, 9.0, 9.5, 9.2]
    found = []
    for step in range(2 * SLOW_STEPS + 1):
        for rank, speed in enumerate(speeds):
            ranks.hear(rank, said(step, step=step, computed=speed * step, stage=rank // 3))
        found += ranks.slow_ranks()
    assert [(rank, round(times, 2)) for rank, times in found] == [(2, 2.27), (2, 2.27)]
    assert Ranks(6, LifeConfig(slow_factor=0.0), 1.0).slow_ranks() == []


def test_progress_tells_where_the_main_thread_is():
    progress.mark("forward", 7)
    assert str(progress.now).startswith("forward of step 7")
    count = progress.now.count
    with progress.collective("all_gather"):
        assert progress.now.waiting and str(progress.now).endswith("in all_gather")
    assert not progress.now.waiting and str(progress.now).endswith("last collective all_gather")
    assert progress.now.count == count + 2
    seen = []
    progress.listeners.append(seen.append)
    try:
        progress.mark("backward")
        with progress.collective("reduce_scatter_tensor"):
            pass
        progress.mark("step")
        with progress.collective("all_reduce"):
            pass
    finally:
        progress.listeners.remove(seen.append)
    assert seen == ["backward", "reduce", "step"]


@pytest.mark.parametrize("rank, phase", [(1, "backward"), (0, "data")])
def test_a_stopped_rank_is_named_with_stacks_and_the_job_goes_on(ranks, tmp_path, rank, phase):
    """SIGSTOP: the others name it with its host within the limit, show their stacks and end; begun again, the run ends as one that
    was left in peace. Rank 0, which has the store, is found by the others."""
    ranks(1).restart()  # ranks are forked from a process that has made no group yet
    (found,) = ranks(1).run(run_with_a_stopped_rank, str(tmp_path), rank, phase, init=False, timeout=300)
    limit, life, equal = found["limit"], found["life"], found["equal"]
    other = 1 - rank
    log = life["logs"][other]
    assert life["status"] == FAULT and life["ends"][other] == FAULT and life["fallen"] == (rank,), log
    # what it was at is what it last said, up to half a second before it was stopped: some steps
    named = re.search(rf"watchdog: no sign of life for ([\d.]+) s from rank {rank} on (\S+), at last in \w+", log)
    assert named, log
    assert float(named[1]) < 3 * limit
    assert re.search(rf"watchdog: rank {other} on {named[2]} was in \w+ of step 3", log)
    assert "train_step" in log or "_next_batches" in log, log  # a stack of the main thread
    assert "watchdog.py" in log  # and those of the others
    assert equal


def run_with_a_stopped_rank(folder: str, rank: int, phase: str) -> dict:
    """In a worker that forks the run's ranks: a life in which `rank` is stopped, and what follows beside a run left in peace."""
    from dataclasses import asdict

    from htc_megatron.benchmarks import faults
    from htc_megatron.benchmarks.supervised import FaultAt, live, losses

    layout, limit, out = Layout(dp=2, zero=2), 5.0, Path(folder) / "out"
    yaml_file = faults.make_run(Path(folder), layout)
    peace = Path(folder) / "peace"
    undisturbed = live(["--config", str(yaml_file), f"output_dir={peace}"], peace, 2, None, 200)
    assert undisturbed.status == 0, undisturbed.logs
    arguments = ["--config", str(yaml_file), f"output_dir={out}", f"life.heartbeat_limit_s={limit}"]
    life = live(arguments, out, 2, FaultAt(rank, 3, phase, number=signal.SIGSTOP), 200, grace=100)
    again = live(arguments, out, 2, None, 200)
    assert again.status == 0, again.logs
    equal = losses(out) == losses(peace) and faults.same(faults.holds(out / "checkpoints"), faults.holds(peace / "checkpoints"))
    return {"limit": limit, "life": json.loads(json.dumps(asdict(life))) | {"ends": life.ends, "fallen": life.fallen}, "equal": equal}

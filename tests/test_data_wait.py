"""The share of time spent waiting for data: what is counted, which rank's is shown, and what the quick start's report says of it."""

import importlib.util
from pathlib import Path

import pytest

from htc_megatron.config import ConfigError
from htc_megatron.data import loader
from htc_megatron.data.loader import Prefetcher
from tests.parity_worker import tiny_config

REPORT = Path(__file__).parent.parent / "examples" / "quickstart_report.py"


def test_waits_are_counted_from_the_end_of_the_first_step(monkeypatch):
    """By a clock of the test's own: a micro-batch takes 3 s to build and a step 7 s. The first is built before anything trains."""
    now = [100.0]
    monkeypatch.setattr(loader.time, "perf_counter", lambda: now[0])

    def build(rows):
        now[0] += 3
        return rows

    prefetch = Prefetcher(((0, [[[i]]]) for i in range(9)), build, workers=0)
    for step in range(4):
        next(prefetch)
        assert (prefetch.wait_seconds, prefetch.wait_share) == (
            3 * step,
            pytest.approx(1 - 7 * (step - 1) / (10 * step - 7)) if step else 0,
        )
        now[0] += 7
    assert prefetch.wait_share == pytest.approx(9 / 30)


def log_steps(folder: Path) -> None:
    from htc_megatron.parallel import groups as process_groups
    from htc_megatron.parallel.bubble import StageClock
    from htc_megatron.training.logger import Logger
    from htc_megatron.training.step import StepResult

    config = tiny_config(output_dir=str(folder), training__train_iters=2)
    groups = process_groups.initialise(config.parallel, 0)
    logger = Logger(config, groups, 0, peak=1e9, clock=StageClock(groups.device))
    for step in (1, 2):
        logger.step(step, StepResult(1.0, 1.0, 10, 1), 0.1, 20, 1e6, waited=0.01 * step * (groups.rank + 1))
    logger.close()


def test_the_rank_that_waits_most_is_shown_and_reported(ranks, tmp_path):
    """Rank 1 waits twice as long as rank 0, which writes; the report takes a training's last figure, and misses none of three."""
    spec = importlib.util.spec_from_file_location("quickstart_report", REPORT)
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    for folder in ("align", "shapes"):
        ranks(2).run(log_steps, tmp_path / folder)
    with pytest.raises(ConfigError, match="tensorboard has no speed/data_wait_share; wanted that of a finished training"):
        report.data_wait(tmp_path)
    ranks(2).run(log_steps, tmp_path)
    assert report.data_wait(tmp_path) == {name: pytest.approx(0.04) for name in ("align", "shapes", "instruct")}

"""Steps whose loss or gradients are bad: left out on all ranks alike, gone back behind, or the end of the run."""

import math
from collections import deque
from pathlib import Path

import pytest
import torch

from htc_megatron.checkpoint import CheckpointReader, latest
from htc_megatron.training.bad_steps import _jumps
from htc_megatron.training.life import TrainingError
from tests.distributed import RankFailure
from tests.train_worker import train, train_on_poison
from tests.training_tiny import make_run

COMMON = ["training.global_batch_size=4", "training.save_interval=1", "training.async_save=false"]
LAYOUTS = {
    "DP 2, ZeRO-1": (2, ["zero=zero1.json"]),
    "ZeRO-2, bf16": (1, ["zero=zero2.json", "training.precision=bf16"]),
    "ZeRO-1, bf16": (1, ["zero=zero1.json", "training.precision=bf16"]),
    "ZeRO-1": (1, ["zero=zero1.json"]),
    "PP 2, ZeRO-3": (2, ["zero=zero3.json", "parallel.pipeline_model_parallel_size=2"]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {key: reader.read(key) for key in reader.manifest.tensors if not key.startswith("rng/")}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "ZeRO-1"])
def test_a_bad_step_is_left_out(ranks, run, tmp_path, layout):
    """One rank's gradients are not finite in step 2: weights and optimiser stay bit for bit, and training goes on."""
    size, overrides = LAYOUTS[layout]
    more = [*COMMON, *overrides, "faults.on_bad_loss=skip", "training.train_iters=3", f"output_dir={tmp_path}"]
    found = ranks(size).run(train_on_poison, str(run), more, [2], math.nan)
    assert [step for step, *_ in found[0]] == [1, 2, 3] and repr(found[0]) == repr(found[-1])  # a nan is not equal to itself
    assert [math.isfinite(norm) for _, _, norm in found[0]] == [True, False, True]
    assert "step 2: the loss is" in ranks(size).output[0] and "the 1. of at most 3 in a row" in ranks(size).output[0]
    one, two, three = (stored(tmp_path / "checkpoints" / f"step_0000000{step}") for step in (1, 2, 3))
    assert all(torch.equal(one[key], two[key]) for key in one) and not all(torch.equal(two[key], three[key]) for key in two)


def test_without_being_asked_for_a_bad_step_ends_the_run(ranks, run, tmp_path):
    overrides = [*COMMON, "training.train_iters=3", f"output_dir={tmp_path}"]
    with pytest.raises(RankFailure, match="step 2: .* both must be finite; the last checkpoint is .*step_00000001") as failure:
        ranks(1).run(train_on_poison, str(run), overrides, [2], math.nan)
    assert all(isinstance(error, TrainingError) for error in failure.value.exceptions.values())
    more = [*overrides, "faults.on_bad_loss=skip", "faults.max_skipped=1", "resume=never", "training.train_iters=5"]
    with pytest.raises(RankFailure, match="step 3: .* both must be finite; the last checkpoint is .*step_00000002"):
        ranks(1).run(train_on_poison, str(run), more, [2, 3], math.inf)


@pytest.mark.parametrize("layout", ["ZeRO-1", "PP 2, ZeRO-3"])
def test_a_run_goes_back_behind_bad_data(ranks, run, tmp_path, layout):
    """Three steps in a row explode: the run goes on from the checkpoint before them with the data behind them, and a run that is
    begun again from any later checkpoint goes on in the same place."""
    size, overrides = LAYOUTS[layout]
    common = [*COMMON, *overrides, "training.save_interval=2", "optimizer.schedule=constant", "optimizer.warmup_ratio=0"]
    common += ["faults.on_bad_loss=roll_back", "faults.max_loss_jump=3.0", "faults.jump_window=2", "faults.max_skipped=2"]
    ours = [*common, "training.train_iters=6", f"output_dir={tmp_path}/ours"]
    # batches 3 to 5 are bad; steps 3 and 4 are left out, 4 is saved, 5 is one too many: on from 4 with batch 6
    found = ranks(size).run(train_on_poison, str(run), ours, [3, 4, 5], 100.0)[0]
    assert [step for step, *_ in found] == [1, 2, 3, 4, 5, 5, 6]
    folder = latest(tmp_path / "ours" / "checkpoints")
    assert CheckpointReader(folder).extra["batches_passed_over"] == 1
    assert CheckpointReader(folder).extra["bad_steps"]["in_a_row"] == 0
    # the same data in a run that never saw the bad batches' gradients: left out one by one
    skipped = [*common, "faults.on_bad_loss=skip", "faults.max_skipped=3", "training.train_iters=7", f"output_dir={tmp_path}/skips"]
    theirs = ranks(size).run(train_on_poison, str(run), skipped, [3, 4, 5], 100.0)[0]
    assert [loss for _, loss, _ in found[-2:]] == [loss for _, loss, _ in theirs[-2:]]
    rest = ranks(size).run(train, str(run), [*ours, "training.train_iters=7"])[0]  # begun again: its place in the data is remembered
    (more,) = ranks(size).run(train, str(run), [*skipped, "training.train_iters=8"])[0]
    assert [loss for _, loss, _ in rest] == [more[1]]


def test_jumps():
    before = deque([1.0, 2.0, 3.0], maxlen=3)
    assert not _jumps(4.0, before, 2.0) and _jumps(4.1, before, 2.0)
    assert not _jumps(1e9, before, 0.0)  # not asked for
    assert not _jumps(1e9, deque([1.0, 2.0], maxlen=3), 2.0)  # too few to tell

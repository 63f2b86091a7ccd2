"""Faults that are made to happen: kills in every phase, a full disk, lost storage, broken samples."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from htc_megatron.benchmarks.supervised import PHASES
from htc_megatron.checkpoint import checkpoints
from htc_megatron.config import ConfigError
from htc_megatron.config_io import load_config
from htc_megatron.data.dataset import PreparedData
from htc_megatron.data.loader import DataLoader
from htc_megatron.parallel.support import Layout
from tests.distributed import RankFailure
from tests.train_worker import train, train_on_a_full_disk, train_without_loss_of
from tests.training_tiny import make_run

PP2 = ["parallel.pipeline_model_parallel_size=2", "training.global_batch_size=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def campaign(folder: str) -> dict:
    """In a worker, which forks the ranks of the runs: a kill in each phase, three to a run."""
    from htc_megatron.benchmarks import faults

    Path(folder).mkdir()
    return faults.campaign(Path(folder), [Layout(dp=2, zero=2)], len(PHASES), 3, 1, print)


def test_a_kill_in_every_phase_changes_nothing(ranks, tmp_path):
    """Weights, optimiser and losses at the end are those of the run left in peace, bit for bit, and the killed rank is named."""
    ranks(1).restart()  # ranks are forked from a process that has made no group yet
    (found,) = ranks(1).run(campaign, str(tmp_path / "faults"), init=False, timeout=400)
    kills = [kill for one in found["runs"] for kill in one["kills"]]
    assert found["kills"] >= len(PHASES) and {kill["phase"] for kill in kills} == set(PHASES)
    assert all(one["equal"] for one in found["runs"]), found
    # killed in the data or before, both ranks may be told by the store alone; whoever is left always finds the other silent
    assert all(kill["named"] for kill in kills), kills


def test_the_benchmark_tells(ranks, tmp_path):
    from htc_megatron.benchmarks import faults

    kill = {"phase": "save", "named": True, "ended_after_s": 2.0}
    result = faults.summary({"runs": [{"kills": [kill], "equal": True}, {"kills": [kill | {"phase": "data"}], "equal": False}]})
    assert result.ratios == {"equal": 0.5}
    assert ("kills", "2") in result.rows and ("  in save", "1") in result.rows and ("  in forward", "0") in result.rows


@pytest.mark.parametrize("beside", [True, False], ids=["training goes on", "training waits"])
def test_a_disk_that_is_full_for_a_while(ranks, run, tmp_path, beside):
    """The saves fail on one rank, twice: with patience no step and no later checkpoint is lost."""
    overrides = ["training.global_batch_size=4", "training.train_iters=6", "training.save_interval=2", f"output_dir={tmp_path}"]
    steps = ranks(2).run(train_on_a_full_disk, str(run), [*overrides, f"training.async_save={str(beside).lower()}"], 2)[0]
    assert [step for step, *_ in steps] == [1, 2, 3, 4, 5, 6]
    kept = [int(folder.name[-1]) for folder in checkpoints(tmp_path / "checkpoints")]
    assert kept == ([6] if beside else [2, 4, 6])
    told = ranks(2).output[0]
    assert ("the checkpoint of step 4 was not written" in told) == beside
    assert ("step 2: the checkpoint was not written, and is tried again" in told) != beside


def test_data_that_are_not_there_for_a_while(run, tmp_path):
    """A shard whose storage is lost between the start and its first sample: waited for, or the end, as configured."""
    data = shutil.copytree(Path(yaml.safe_load(run.read_text())["data"]["train"]), tmp_path / "data")
    (shard,) = data.glob("*.safetensors")
    config = load_config(run, [f"data.train={data}", "faults.storage_patience_s=60"])
    expected = DataLoader(config, data, 0, 1, True)
    wanted = next(expected)
    expected.close()
    for workers in (1, 0):
        config.data.num_workers = workers
        loader = LostData(config, data, shard)
        threading.Timer(1.0, os.rename, (loader.away, shard)).start()
        began = time.monotonic()
        while not loader.ready(0.1):
            assert time.monotonic() - began < 50
        found = next(loader)
        loader.close()
        assert all(
            (a.input_ids == b.input_ids).all() and (a.pixel_values == b.pixel_values).all() for a, b in zip(found, wanted, strict=True)
        )
    config.faults.storage_patience_s = 0.1
    loader = LostData(config, data, shard)
    with pytest.raises(OSError, match="data could not be read for .*: it is missing") as error:
        next(loader)
    assert not isinstance(error.value, ConfigError)  # a fault: begun again, the run may find it
    loader.close()


class LostData(DataLoader):
    """A loader whose shard is gone once it is made."""

    def __init__(self, config, data: Path, shard: Path):
        self.away = shard.with_name("away")
        super().__init__(config, data, 0, 1, True)
        os.rename(shard, self.away)


@pytest.fixture(scope="module")
def broken(run, tmp_path_factory) -> tuple[Path, list[int]]:
    """The run's data with a picture that is none any more, and the samples that show it."""
    folder = shutil.copytree(Path(yaml.safe_load(run.read_text())["data"]["train"]), tmp_path_factory.mktemp("broken") / "data")
    data = PreparedData(folder)
    shard, _ = data.locate(0)
    picture = shard.image_bytes(3)
    samples = [sample for sample in range(len(data)) if 3 in shard.images_of(sample)]
    content = bytearray(shard.path.read_bytes())
    place = content.find(picture)
    content[place : place + 40] = bytes(40)
    shard.path.write_bytes(content)
    assert len(samples) > 2
    return folder, samples


def test_broken_samples_are_trained_on_by_no_rank(ranks, run, broken, tmp_path):
    """The first stage alone decodes; the last one, which has the loss, leaves the same samples out. Losses and norms are those of a run
    on whole data in which these samples carry no loss."""
    folder, samples = broken
    common = [*PP2, "training.train_iters=4"]
    expected = ranks(2).run(train_without_loss_of, str(run), [*common, f"output_dir={tmp_path}/whole"], samples)
    overrides = [*common, f"data.train={folder}", "data.max_bad_share=0.9", f"output_dir={tmp_path}/broken"]
    found = ranks(2).run(train, str(run), overrides)
    assert np.allclose(found[0], expected[0], rtol=1e-6, atol=0) and found[0] == found[1]
    lines = [json.loads(line) for line in (tmp_path / "broken" / "quarantine.jsonl").read_text().splitlines()]
    assert lines and all("image 3: " in line["why"] and line["step"] in range(1, 5) for line in lines)
    assert len({line["why"] for line in lines}) == len(lines)
    assert "leaves out broken samples" in ranks(2).output[0]


def test_more_broken_samples_than_allowed_end_the_run(ranks, run, broken, tmp_path):
    folder, _ = broken
    overrides = [*PP2, "training.train_iters=4", f"data.train={folder}", f"output_dir={tmp_path}"]
    with pytest.raises(
        RankFailure, match=r"step \d: \d of 96 samples are broken, data.max_bad_share is 0.001; the last: sample .*image 3"
    ) as failure:
        ranks(2).run(train, str(run), overrides)
    assert sorted(failure.value.exceptions) == [0, 1]
    with pytest.raises(RankFailure, match="shard-00000.safetensors: image 3: .* not an image"):
        ranks(1).run(train, str(run), ["data.max_bad_share=0", f"data.train={folder}", f"output_dir={tmp_path}", "training.train_iters=4"])

"""Killed, failed and repeated saves: the last complete checkpoint is always there."""

import os
import shutil
import signal
import sys

import pytest
import torch

from htc_megatron import checkpoint
from htc_megatron.checkpoint import CheckpointError, CheckpointReader, latest
from htc_megatron.checkpoint.box_file import CheckedWriter
from tests.checkpoint_tiny import check, save, whole_model


def killed_at(count: int, work) -> int:
    """Run `work` in a child that is killed at its `count`-th touch of the file system. Returns the touches it made if it lived, or -1."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        touches = 0

        def touch(*_):
            nonlocal touches
            touches += 1
            if touches == count:
                os.kill(os.getpid(), signal.SIGKILL)

        events = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
        sys.addaudithook(lambda event, args: touch() if event in events and str(args[0]).startswith(("/", ".")) else None)
        fsync, write = os.fsync, CheckedWriter.write
        os.fsync = lambda descriptor: (touch(), fsync(descriptor), touch())

        def write_halves(self, data):
            half = len(data) // 2
            write(self, memoryview(data)[:half])
            touch()
            write(self, memoryview(data)[half:])

        CheckedWriter.write = write_halves
        try:
            work()
            os.write(writing, str(touches).encode())
        finally:
            os._exit(0)
    os.close(writing)
    told = os.read(reading, 100)
    os.close(reading)
    os.waitpid(child, 0)
    return int(told) if told else -1


@pytest.mark.parametrize("step", [2, 1])
def test_a_save_killed_anywhere_leaves_a_good_checkpoint(tmp_path, step):
    """Killed at every single touch of the disk, writing the next step or the same step again, keeping one checkpoint."""
    total = killed_at(0, lambda: (save(tmp_path / "count"), save(tmp_path / "count", step=step, seed=1, keep=1)))
    done = killed_at(0, lambda: save(tmp_path / "first"))
    points = total - done
    assert points >= 30
    new = 0
    for point in range(1, points + 1):
        root = shutil.copytree(tmp_path / "first", tmp_path / f"at{point}")
        assert killed_at(point, lambda root=root: save(root, step=step, seed=1, keep=1)) == -1
        folder = latest(root)
        reader = CheckpointReader(root)
        fresh = not torch.equal(reader.tensor("frontend.voco.weight"), whole_model(0)["frontend.voco.weight"])
        new += fresh
        check(root, int(fresh))
        assert (root / "latest").read_text().strip() == folder.name or fresh
        save(root, step=3, seed=2, keep=1)
        check(root, 2)
        assert sorted(p.name for p in root.iterdir()) == ["latest", "step_00000003"], "what the killed save left is gone"
    assert 0 < new < points


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, step=2, seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    check(tmp_path, 0)


def test_latest_and_how_many_stay(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step=step, seed=step)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [f"step_0000000{step}" for step in (1, 2, 3, 4)]
    save(tmp_path, step=5, seed=5, keep=3)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [f"step_0000000{step}" for step in (3, 4, 5)]
    save(tmp_path, step=5, seed=6, keep=9)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_00000003", "step_00000004", "step_00000005-1"]
    check(tmp_path, 6)
    (tmp_path / "latest").write_text("step_00000003\n")  # someone goes back
    check(tmp_path, 3)
    (tmp_path / "latest").unlink()
    check(tmp_path, 6)
    (tmp_path / "latest").write_text("step_00000099\n")
    check(tmp_path, 6)
    assert latest(tmp_path / "nothing") is None


def test_an_unfinished_folder_is_no_checkpoint(tmp_path):
    folder = save(tmp_path)
    unfinished = tmp_path / ".saving_step_00000009"
    unfinished.mkdir()
    (unfinished / "rank_00000.safetensors").write_bytes((folder / "rank_00000.safetensors").read_bytes())
    (tmp_path / "step_00000010").mkdir()
    assert latest(tmp_path) == folder
    with pytest.raises(CheckpointError, match="never completed"):
        CheckpointReader(unfinished)

"""Killed, failed and repeated saves: the last complete checkpoint is always there."""

import os
import select
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from htc_megatron import checkpoint
from htc_megatron.checkpoint import CheckpointError, CheckpointReader, Place, latest
from htc_megatron.checkpoint.box_file import CheckedWriter
from htc_megatron.config import RunConfig
from tests.checkpoint_tiny import MODEL, check, plain, save, whole_model


def die_at(count: int) -> Callable[[], int]:
    """This process is killed at its `count`-th touch of the file system from now on. Returns what tells how many there were."""
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
    return lambda: touches


class Child:
    """A process forked to call `work`, whose answer it sends."""

    def __init__(self, work: Callable[[], object]):
        self.reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.write(writing, str(work()).encode())
            finally:
                os._exit(0)
        os.close(writing)

    def answer(self, limit: float = 60.0) -> str:
        """What `work` returned; "" if it was killed. Fails if it is still running after `limit` seconds."""
        ready, _, _ = select.select([self.reading], [], [], limit)
        if not ready:
            os.kill(self.pid, signal.SIGKILL)
        told = os.read(self.reading, 4096).decode()
        os.close(self.reading)
        os.waitpid(self.pid, 0)
        assert ready, f"it was still running after {limit} s"
        return told


def killed_at(count: int, work) -> int:
    """Run `work` in a child that is killed at its `count`-th touch of the file system. Returns the touches it made if it lived, or -1."""

    def counted() -> int:
        touches = die_at(count)
        work()
        return touches()

    told = Child(counted).answer()
    return int(told) if told else -1


def save_in_a_thread(root, step: int = 1, seed: int = 0, **more):
    return checkpoint.save_async(root, plain(whole_model(seed)), step=step, config=RunConfig(model=MODEL), group=None, **more).wait()


def check_after_kill(root) -> bool:
    """What a killed save of seed 1 left over one of seed 0 is one of the two, whole. Returns whether it is the new one."""
    folder = latest(root)
    fresh = not torch.equal(CheckpointReader(root).tensor("frontend.voco.weight"), whole_model(0)["frontend.voco.weight"])
    check(root, int(fresh))
    assert (root / "latest").read_text().strip() == folder.name or fresh
    return fresh


@pytest.mark.parametrize(("step", "save_it"), [(2, save), (1, save), (2, save_in_a_thread)], ids=["next step", "same step", "in a thread"])
def test_a_save_killed_anywhere_leaves_a_good_checkpoint(tmp_path, step, save_it):
    """Killed at every single touch of the disk, writing the next step or the same step again, keeping one checkpoint."""
    total = killed_at(0, lambda: (save(tmp_path / "count"), save_it(tmp_path / "count", step=step, seed=1, keep=1)))
    done = killed_at(0, lambda: save(tmp_path / "first"))
    points = total - done
    assert points >= 30
    new = 0
    for point in range(1, points + 1):
        root = shutil.copytree(tmp_path / "first", tmp_path / f"at{point}")
        assert killed_at(point, lambda root=root: save_it(root, step=step, seed=1, keep=1)) == -1
        new += check_after_kill(root)
        save(root, step=3, seed=2, keep=1)
        check(root, 2)
        assert sorted(p.name for p in root.iterdir()) == ["latest", "step_00000003"], "what the killed save left is gone"
    assert 0 < new < points


def two_ranks(root, meeting, victim: int, count: int, in_a_thread: bool) -> list[str]:
    """Two processes save half a model each, and `victim` is killed at its `count`-th touch of the disk. What each of them tells."""

    def work(rank: int) -> str:
        # far above the time limit of `answer`: the survivor must notice the other's end, not wait for a limit of its own
        dist.init_process_group("gloo", store=dist.FileStore(str(meeting), 2), rank=rank, world_size=2, timeout=timedelta(seconds=600))
        group = dist.new_group(backend="gloo") if in_a_thread else None
        dist.barrier()
        state = plain(whole_model(1), Place(rank, 2, tp_rank=rank, tp_size=2))
        arguments = {"step": 2, "config": RunConfig(model=MODEL), "group": group}
        touches = die_at(count if rank == victim else 0)
        try:
            checkpoint.save_async(root, state, **arguments).wait() if in_a_thread else checkpoint.save(root, state, **arguments)
        except CheckpointError as error:
            return f"error: {error}"
        return str(touches())

    children = [Child(partial(work, rank)) for rank in (0, 1)]
    return [child.answer() for child in children]


def test_a_killed_rank_leaves_a_good_checkpoint(tmp_path):
    """Two ranks, one of them killed at 30 points spread over what it does, in a save that training waits for and one in a thread:
    the other rank ends with a sentence and does not wait for a dead one."""
    save(tmp_path / "first")
    new = 0
    for in_a_thread in (False, True):
        root = shutil.copytree(tmp_path / "first", tmp_path / f"count_{in_a_thread}")
        counted = two_ranks(root, root.with_name(f"{root.name} meeting"), 0, 0, in_a_thread)
        for victim, many in ((0, 10), (1, 5)):
            touches = int(counted[victim])
            for count in (1 + i * (touches - 1) // (many - 1) for i in range(many)):  # from its first touch to its last
                root = shutil.copytree(tmp_path / "first", tmp_path / f"at_{victim}_{count}_{in_a_thread}")
                told = two_ranks(root, root.with_name(f"{root.name} meeting"), victim, count, in_a_thread)
                assert told[victim] == "", "the victim lived"
                assert told[1 - victim].startswith(f"error: rank {1 - victim} of 2 lost another rank in the middle of a checkpoint"), told
                new += check_after_kill(root)
    assert new == 2, "rank 0's last touch is behind the move of `latest`, every other one here before it"


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

"""The checkpoints of a run as it goes on: written beside training, waited for at its end, tried again while storage is lost."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from htc_megatron.checkpoint import CheckpointError, HostBuffers, Loaded, PeerLost, PendingSave, save, save_async
from htc_megatron.checkpoint.rng import rng_state
from htc_megatron.config import RunConfig
from htc_megatron.parallel import progress
from htc_megatron.parallel.groups import Groups
from htc_megatron.training.logger import Logger

LONGEST_PAUSE = 30.0  # seconds between two trials of a save


def checkpoint_folder(config: RunConfig) -> Path:
    """Where a run's checkpoints are."""
    return Path(config.output_dir) / "checkpoints"


class Saves:
    """Checkpoints are written by a thread while training goes on (training.async_save); training stands still for the copy to
    host memory only, and for the end of the save before, so at most one is under way. The last checkpoint has nothing to be
    written beside and is not copied.

    A save that fails on any rank fails on all, but each learns it at its own time, so nothing is raised before they meet for the
    next save (the first rank says so at once). Within faults.storage_patience_s of the first failure training goes on beside that one
    too. Afterwards it is waited for: if it succeeds, no step is lost and the run goes on; if it fails too, its CheckpointError ends
    the run on every rank. A save that training waits for from the start is tried again for as long.

    state: what checkpoint_state gave. resumed: the checkpoint that the run goes on from.

    Attributes: last, last_step: the last complete checkpoint, and its step (-1: there is none). pending: the save under way.
    """

    def __init__(self, config: RunConfig, state: Any, groups: Groups, logger: Logger, resumed: Loaded | None):
        self.config, self.state, self.groups, self.logger = config, state, groups, logger
        self.folder = checkpoint_folder(config)
        self.last: Path | None = None if resumed is None else resumed.folder
        self.last_step = -1 if resumed is None else resumed.step
        self.pending: PendingSave | None = None
        self._stall, self._told = 0.0, False  # of it: how long training stood still; whether its failure was told
        self._failing_since: float | None = None  # when the first of the saves failed that have failed in a row
        self._buffers = HostBuffers()

    def save(self, step: int, extra: dict[str, Any], wait: bool) -> None:
        """Write a checkpoint, or begin to. wait: until it is written. Called by every rank. Raises CheckpointError, on all alike, where
        it fails at once."""
        training = self.config.training
        progress.mark("save")
        began = time.perf_counter()
        failed = self.end(step)
        what = {"step": step, "config": self.config, "extra": extra, "rng": rng_state()}
        how = {"keep": training.keep_checkpoints, "group": self.groups.checkpoint}
        beside = training.async_save and step < training.train_iters and not wait
        if beside and (not failed or self._is_patient()):
            self.pending = save_async(self.folder, self.state, **what, **how, buffers=self._buffers)
            self._stall, self._told = time.perf_counter() - began, False
        else:
            self.logger.state("saving")
            self.last = self._patiently(step, lambda: save(self.folder, self.state, **what, **how))
            self.last_step = step
            seconds = time.perf_counter() - began
            self._report(step, seconds, seconds)

    def end(self, step: int) -> bool:
        """Wait for the save under way, if there is one. Called by every rank. Returns whether it failed, on all alike."""
        if self.pending is None:
            return False
        pending, self.pending = self.pending, None
        try:
            self.last, self.last_step = pending.wait(), pending.step
        except CheckpointError:
            self._tell_failure(pending, step)
            self._failing_since = self._failing_since or time.monotonic()
            return True
        self._failing_since = None
        self._report(pending.step, self._stall, pending.seconds)
        return False

    def watch(self, step: int) -> None:
        """Take note of a save that has ended. No rank waits here or does anything the others would have to do too."""
        if self.pending is not None and self.pending.done:
            if self.pending.error is None:
                self.end(step)
            else:
                self._tell_failure(self.pending, step)

    def _patiently(self, step: int, save_now: Callable[[], Path]) -> Path:
        """Save, and again where that fails, for as long as there is patience. Raises the last failure's CheckpointError."""
        pause = 1.0
        while True:
            try:
                saved = save_now()
            except PeerLost:
                raise  # with a rank gone no trial can succeed
            except CheckpointError as error:
                self._failing_since = self._failing_since or time.monotonic()
                if not self._is_patient():
                    raise
                self.logger.say(f"step {step}: the checkpoint was not written, and is tried again: {error}")
            else:
                self._failing_since = None
                return saved
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            progress.mark("save")

    def _is_patient(self) -> bool:
        """Whether saves have not failed for longer than faults.storage_patience_s: by the first rank's clock, so for all alike."""
        patience = self.config.faults.storage_patience_s
        if not patience:
            return False
        left = torch.tensor(patience - (time.monotonic() - (self._failing_since or time.monotonic())))
        dist.broadcast(left, 0, group=self.groups.checkpoint)
        return left.item() > 0

    def _tell_failure(self, pending: PendingSave, step: int) -> None:
        if not self._told:
            self._told = True
            self.logger.say(f"step {step}: the checkpoint of step {pending.step} was not written: {pending.error}")

    def _report(self, step: int, stall: float, seconds: float) -> None:
        self.logger.write(step, {"checkpoint/stall_s": stall, "checkpoint/write_s": seconds})
        self.logger.state("training", checkpoint=str(self.last))
        self.logger.say(f"step {step}: saved {self.last} (stalled {stall:.2f} s, written in {seconds:.2f} s)")

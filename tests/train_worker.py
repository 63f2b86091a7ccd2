"""Whole runs, as the entry point makes them, on every rank of a test."""

import io
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from htc_megatron.checkpoint.box_file import CheckedWriter
from htc_megatron.config_io import check, load_config, load_zero
from htc_megatron.data.collate import Collator
from htc_megatron.parallel import groups as process_groups
from htc_megatron.training import step as step_module
from htc_megatron.training import trainer as trainer_module
from htc_megatron.training.trainer import Trainer, check_files

ENTRY = Path(__file__).parent.parent / "pretrain" / "pretrain_htc.py"


def entry_point(arguments: list[str], world_size: int) -> tuple[int, str, bool]:
    """The entry point's exit status, what it wrote to stderr, and whether it made a process group. world_size: what it is told."""
    errors = io.StringIO()
    environment = mock.patch.dict(os.environ, WORLD_SIZE=str(world_size))
    with environment, mock.patch.object(sys, "argv", [str(ENTRY), *arguments]), redirect_stderr(errors):
        status = runpy.run_path(str(ENTRY))["main"]()
    return status, errors.getvalue(), dist.is_initialized()


def train(yaml: str, overrides: list[str], before: Callable[[Trainer], None] | None = None) -> list[tuple[int, float, float]]:
    """Step number, loss and gradient norm of every step this run makes. before: called before each."""
    config = load_config(yaml, overrides)
    parallel = config.parallel
    zero = load_zero(config.zero)
    check_files(config)
    groups = process_groups.initialise(parallel, config.training.seed)
    check(config, groups.world_size)
    trainer = Trainer(config, zero, groups)
    found = []
    before = before or (lambda trainer: None)
    original = trainer_module.train_step

    def recorded(engine, batches, lr, *more):
        before(trainer)
        result = original(engine, batches, lr, *more)
        found.append((trainer.step_number + 1, result.loss, result.grad_norm))
        return result

    trainer_module.train_step = recorded
    try:
        trainer.run()
    finally:
        trainer_module.train_step = original
        trainer.engine.destroy()
    return found


@contextmanager
def slow_disk(seconds: float, failures: int = 0) -> Iterator[None]:
    """Every file of a checkpoint takes `seconds` to be made, before a byte is written; the first `failures` never reach the disk."""
    make, fsync = CheckedWriter.__init__, os.fsync

    def slowly(self: CheckedWriter, path: Path) -> None:
        time.sleep(seconds)
        make(self, path)

    def failing(descriptor: int) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with mock.patch.object(CheckedWriter, "__init__", slowly), mock.patch.object(os, "fsync", failing):
        yield


def train_while_saving(yaml: str, overrides: list[str]) -> tuple[list[tuple[int, float, float]], list[int]]:
    """What `train` returns, and the steps that began while a checkpoint was being written. No thread makes its rank's file, let
    alone reads a byte for it, before training has done a whole step after the save began."""
    beside, stepped, make = [], threading.Event(), CheckedWriter.__init__

    def wait_for_step(self: CheckedWriter, path: Path) -> None:
        if threading.current_thread() is not threading.main_thread() and path.name.startswith("rank_"):
            assert stepped.wait(100), "no step was made while a save was under way"
            stepped.clear()
        make(self, path)

    def note(trainer: Trainer) -> None:
        if trainer.saves.pending is not None and not trainer.saves.pending.done:
            beside.append(trainer.step_number + 1)
            if trainer.step_number > trainer.saves.pending.step:
                stepped.set()

    with mock.patch.object(CheckedWriter, "__init__", wait_for_step):
        return train(yaml, overrides, note), beside


def train_on_a_full_disk(yaml: str, overrides: list[str], failures: int) -> list[tuple[int, float, float]]:
    """What `train` returns where the last rank's first files cannot be written."""
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    with slow_disk(0.0, failures if last else 0):
        return train(yaml, overrides)


def train_until(yaml: str, overrides: list[str], step: int, how: str) -> None:
    """A run that ends before `step` while a checkpoint is being written: all ranks raise, or the last one is killed."""

    def end(trainer: Trainer) -> None:
        if trainer.step_number + 1 == step:
            assert not trainer.saves.pending.done, "the checkpoint was complete before the run ended"
            if how == "error":
                raise RuntimeError("the end of the run")
            if trainer.groups.rank == trainer.groups.world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    with slow_disk(0.3):
        train(yaml, overrides, end)


def logits_of(yaml: str, overrides: list[str]):
    """The first validation batch of data-parallel rank 0 and its logits by the run's latest checkpoint; None off the last stage."""
    config = load_config(yaml, [*overrides, "training.eval_interval=1", "training.eval_iters=1"])
    groups = process_groups.initialise(config.parallel, config.training.seed)
    trainer = Trainer(config, load_zero(config.zero), groups)
    assert trainer.step_number > 0, "no checkpoint was found"
    (batches,) = trainer.validation

    def step(steps, model):
        output = model(next(steps), logits=True)
        return output, lambda logits: (logits.sum(), torch.tensor(1, dtype=torch.int), logits)

    shape = trainer.engine.module.shape_between_stages(batches[0].layout)
    reports = trainer.engine.evaluate(step, iter(batches[:1]), 1, shape)
    trainer.loader.close()
    trainer.logger.close()
    trainer.engine.destroy()
    return (batches[0].input_ids, reports[0]) if groups.last_stage else None


def train_on_poison(yaml: str, overrides: list[str], batches: list[int], factor: float) -> list[tuple[int, float, float]]:
    """What `train` returns where the losses of these global batches, counted from 1 as they are read, are multiplied by `factor` on
    the last rank alone."""
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    original, trainers = step_module._forward_step, []

    def poisoned(scale: float):
        if last and trainers and trainers[0].loader.consumed_batches in batches:
            step = original(scale)

            def forward_step(steps, model):
                output, loss = step(steps, model)

                def multiplied(loss_sum):
                    scaled, count, report = loss(loss_sum)
                    return scaled * factor, count, report * factor

                return output, multiplied

            return forward_step
        return original(scale)

    with mock.patch.object(step_module, "_forward_step", poisoned):
        return train(yaml, overrides, lambda trainer: trainers.append(trainer))


def train_without_loss_of(yaml: str, overrides: list[str], samples: list[int]) -> list[tuple[int, float, float]]:
    """What `train` returns where these samples carry no loss."""
    build = Collator.__call__

    def without(self: Collator, rows: list[list[int]]):
        batch = build(self, rows)
        for place, sample in zip(batch.layout.samples.tolist(), (sample for members in rows for sample in members), strict=True):
            if sample in samples:
                row, start, stop = place
                batch.labels[row, start:stop] = -100
        return batch

    with mock.patch.object(Collator, "__call__", without):
        return train(yaml, overrides)

"""Runs that are asked to stop, on every rank of a test."""

import os
from unittest import mock

from htc_megatron.data.loader import Prefetcher
from htc_megatron.training import step as step_module
from htc_megatron.training import trainer as trainer_module
from tests.train_worker import entry_point


def stopped_run(arguments: list[str], rank: int, number: int, where: str, at: int) -> tuple[int, str]:
    """The entry point, with a signal to `rank` alone: in its `at`-th step of training, of evaluation or wait for data.

    Returns the exit status and what was written to stderr. where: train, evaluate or data.
    """
    seen = 0

    def signalled(original):
        def call(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == at and os.environ["RANK"] == str(rank):
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        return call

    targets = {
        "train": (trainer_module, "train_step"),
        "evaluate": (step_module, "_global_counts"),
        "data": (Prefetcher, "ready"),
    }
    owner, name = targets[where]
    with mock.patch.object(owner, name, signalled(getattr(owner, name))):
        status, errors, _ = entry_point(arguments, int(os.environ["WORLD_SIZE"]))
    return status, errors

"""What this rank is at: the phase, pass and collective its main thread last began, for whoever asks when it no longer answers.

Marks cost a microsecond. Threads beside the main one (data, checkpoints, watchdog) leave none: they would hide that training stands.
"""

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

MAIN = threading.main_thread().ident


@dataclass
class Progress:
    """phase: data, forward, backward, reduce, step, save, evaluate, load, or a message of the pipeline by mcore's name. step: the
    optimiser step under way, from 1. collective: the last one begun. waiting: whether for other ranks. count: marks so far. at: time
    of the last (monotonic). waited: seconds in collectives. computed: seconds in forward and backward passes, less those in
    collectives: what tells a slow rank from one that waits for it."""

    phase: str = "start"
    step: int = 0
    collective: str = ""
    waiting: bool = False
    count: int = 0
    at: float = 0.0
    waited: float = 0.0
    computed: float = 0.0

    def __str__(self) -> str:
        words = [f"{self.phase} of step {self.step}" if self.step else self.phase]
        words += [f"{'in' if self.waiting else 'last collective'} {self.collective}"] if self.collective else []
        return ", ".join(words)


now = Progress(at=time.monotonic())
listeners: list[Callable[[str], None]] = []  # called with each phase as it begins; for tests that make a fault happen there


def mark(phase: str, step: int | None = None, waiting: bool = False) -> None:
    """The main thread begins `phase`."""
    if threading.get_ident() != MAIN:
        return
    now.phase, now.waiting, now.at, now.count = phase, waiting, time.monotonic(), now.count + 1
    if step is not None:
        now.step = step
    for listener in listeners:
        listener(phase)


@contextmanager
def collective(name: str):
    """The main thread is in a collective of this name. A reduction within backward is the phase `reduce`."""
    if threading.get_ident() != MAIN:
        yield
        return
    now.collective, now.waiting, now.at, now.count = name, True, time.monotonic(), now.count + 1
    if now.phase == "backward" and "reduce" in name:
        for listener in listeners:
            listener("reduce")
    try:
        yield
    finally:
        ended = time.monotonic()
        now.waited += ended - now.at
        now.waiting, now.at, now.count = False, ended, now.count + 1

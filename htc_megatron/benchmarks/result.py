"""What a benchmark returns: a table for people, and ratios and figures for programs."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

Say = Callable[[str], None]  # shows a sentence of progress

PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers")


@dataclass(frozen=True)
class Result:
    """rows: what a figure is, and the figure. ratios: ours against the peers', by the names in the README. figures: all else."""

    rows: Sequence[tuple[str, str]]
    ratios: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """Two columns, names to the left and figures to the right."""
        rows = [*self.rows, *((name, f"{ratio:.3g}") for name, ratio in self.ratios.items())]
        wide, narrow = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{name:{wide}}  {figure:>{narrow}}" for name, figure in rows)

    def record(self, command: str) -> dict[str, Any]:
        """What is written as JSON."""
        return {"command": command, "machine": machine(), "table": list(self.rows), "ratios": self.ratios, **self.figures}


def machine() -> dict[str, Any]:
    """Versions, processors, threads and load: what a figure depends on beside the code."""
    found: dict[str, Any] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found |= {"python": platform.python_version(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """`work` as one that returns its own seconds, the device's included."""

    def run() -> float:
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return run


def alternated(works: dict[str, Callable[[], float]], rounds: int, say: Say = lambda sentence: None) -> dict[str, list[float]]:
    """Figures of each of `works`, one a round, taken in turn: what else the machine does falls on all of them.

    Each work returns its own figure, mostly seconds; every other round goes the other way round. The first call of each is a
    warm-up and not counted.
    """
    for work in works.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for name in list(works)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(works[name]())
    return found


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios of figures taken in the same round."""
    return median(a / b for a, b in zip(over, under, strict=True))

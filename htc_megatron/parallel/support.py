"""The support matrix: which layouts are tested equal to one process, and the rule that refuses the others.

TESTED is the parameter list of tests/test_parity.py, which compares loss and gradient norm of four optimiser steps with
one process. A layout's *kind* is what it uses, not how much: TP 8 x PP 8 x DP 64 runs the same code as TP 2 x PP 2 x DP 2.
A kind is accepted when

1. its four of tensor, pipeline and data parallelism (each on or off) and ZeRO stage stand in a row of the list, and
2. any three of its seven settings (those four, sequence parallelism, recomputation, one reduction a step) stand
   together in a row of the list.

So the list is a covering array of strength three: a fault that needs one, two or three settings to meet cannot hide, one
that needs four or more could, except among the first four. Sizes above the tested ones rest on the code having no case
for them; PP 4 is in the list because only there a stage is neither first nor last. Removing a row refuses what it alone
covered.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from htc_megatron.config import ConfigError, RunConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of TP, PP and DP, the ZeRO stage, and the options that change what ranks exchange or recompute."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 1
    sequence_parallel: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    reduce_once: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def options(self) -> str:
        """The options that are on, in words; "plain" without any."""
        words = ["sequence parallel"] if self.sequence_parallel else []
        words += [f"{self.recompute} recompute"] if self.recompute != "none" else []
        words += ["one reduction"] if self.reduce_once else []
        return ", ".join(words) or "plain"

    def __str__(self) -> str:
        sizes = " x ".join(f"{name} {size}" for name, size in (("TP", self.tp), ("PP", self.pp), ("DP", self.dp)))
        return f"{sizes}, ZeRO-{self.zero}" + ("" if self.options == "plain" else f", {self.options}")

    @property
    def settings(self) -> tuple[tuple[str, str], ...]:
        """(name, value) of the seven settings that make the kind."""
        return (
            ("tensor parallelism", "on" if self.tp > 1 else "off"),
            ("pipeline parallelism", "on" if self.pp > 1 else "off"),
            ("data parallelism", "on" if self.dp > 1 else "off"),
            ("ZeRO stage", str(self.zero)),
            ("sequence_parallel", "on" if self.sequence_parallel else "off"),
            ("recompute", self.recompute),
            ("reduce_once", "on" if self.reduce_once else "off"),
        )


TESTED = (
    # plain
    Layout(pp=2),
    Layout(pp=4),
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(dp=2),
    Layout(dp=2, zero=2),
    Layout(dp=2, zero=3),
    Layout(pp=2, dp=2),
    Layout(pp=2, dp=2, zero=2),
    Layout(pp=2, dp=2, zero=3),
    Layout(tp=2, pp=2),
    Layout(tp=2, pp=2, zero=2),
    Layout(tp=2, pp=2, zero=3),
    Layout(tp=2, pp=2, dp=2, zero=3),
    # options, chosen so that any three settings meet
    Layout(recompute="full"),
    Layout(reduce_once=True),
    Layout(zero=2, recompute="selective", reduce_once=True),
    Layout(zero=3, recompute="selective"),
    Layout(dp=2, zero=2, recompute="full"),
    Layout(dp=2, zero=3, recompute="selective", reduce_once=True),
    Layout(pp=2, recompute="selective"),
    Layout(pp=2, zero=2, recompute="selective"),
    Layout(pp=4, zero=3, recompute="full", reduce_once=True),
    Layout(pp=2, dp=2, recompute="full", reduce_once=True),
    Layout(tp=2, recompute="selective"),
    Layout(tp=2, zero=2, recompute="full", reduce_once=True),
    Layout(tp=2, zero=3, sequence_parallel=True, reduce_once=True),
    Layout(tp=2, dp=2, sequence_parallel=True, recompute="full", reduce_once=True),
    Layout(tp=2, dp=2, zero=2, sequence_parallel=True, recompute="selective"),
    Layout(tp=2, dp=2, zero=3, sequence_parallel=True, recompute="full"),
    Layout(tp=2, pp=2, zero=2, sequence_parallel=True, recompute="full"),
    Layout(tp=2, pp=2, zero=3, sequence_parallel=True, recompute="selective", reduce_once=True),
    Layout(tp=2, pp=2, dp=2, sequence_parallel=True, recompute="selective", reduce_once=True),
    Layout(tp=2, pp=2, dp=2, zero=2, sequence_parallel=True, reduce_once=True),
)
REFERENCE = Layout()  # one process: what all others are compared with


def layout_of(config: RunConfig, world_size: int, zero_stage: int) -> Layout:
    """The layout of a run that `check` has accepted for this number of processes."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return Layout(
        tp=tp,
        pp=pp,
        dp=world_size // (tp * pp),
        zero=zero_stage,
        sequence_parallel=parallel.sequence_parallel,
        recompute=parallel.recompute,
        reduce_once=parallel.reduce_once,
    )


def untested(layout: Layout, tested: tuple[Layout, ...] = TESTED) -> Iterator[str]:
    """What keeps a layout from being accepted, in words; nothing if it is covered."""
    rows = [set(row.settings) for row in (*tested, REFERENCE)]
    core = layout.settings[:4]
    for together in (core, *combinations(layout.settings, 3)):
        if not any(row.issuperset(together) for row in rows):
            yield " with ".join(f"{name} {value}" for name, value in together)


def refuse_untested(config: RunConfig, world_size: int, zero_stage: int) -> None:
    """ConfigError for a layout of a kind that no test covers."""
    layout = layout_of(config, world_size, zero_stage)
    gap = next(untested(layout), None)
    if gap:
        raise ConfigError(f"parallel: {layout}: got {gap}, which is not tested equal to one process; wanted a layout of the support matrix")


def matrix_markdown() -> str:
    """The README's table: a row for each of TP, PP, DP on or off, a column for each ZeRO stage, a cell for its tests."""
    lines = ["| layout | ZeRO-1 | ZeRO-2 | ZeRO-3 |", "| --- | --- | --- | --- |"]
    cells: dict[str, dict[int, list[str]]] = {}
    for row in sorted((REFERENCE, *TESTED), key=lambda row: (row.tp > 1, row.pp > 1, row.dp > 1)):
        on = [name for name, size in (("TP", row.tp), ("PP", row.pp), ("DP", row.dp)) if size > 1]
        depth = f"PP {row.pp}: " if row.pp > 2 else ""
        text = "the reference" if row == REFERENCE else depth + row.options
        cells.setdefault(" x ".join(on) or "one process", {}).setdefault(row.zero, []).append(text)
    for name, stages in cells.items():
        lines.append(f"| {name} | " + " | ".join("; ".join(stages.get(stage, ["refused"])) for stage in (1, 2, 3)) + " |")
    return "\n".join(lines) + "\n"

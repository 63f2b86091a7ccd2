"""The pipeline's bubble: the share of a step's passes in which a stage does not compute, foretold and measured."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from htc_megatron.parallel import progress
from htc_megatron.parallel.groups import Groups


def idle_shares(costs: Sequence[tuple[float, float]], micro_batches: int) -> list[float]:
    """Share of a step's passes in which each stage stands still under 1F1B, by replaying the schedule.

    costs: (forward, backward) of each stage for one micro-batch, in any unit. Messages cost nothing and hold no sender up. With equal
    stages that is (p - 1) / (m + p - 1) for p stages and m micro-batches (Narayanan et al., "Efficient Large-Scale Language Model
    Training on GPU Clusters Using Megatron-LM", 2021, section 2.2).
    """
    stages = len(costs)
    orders = []  # of passes on each stage: 0 forward, 1 backward
    for stage in range(stages):
        warmup = min(stages - 1 - stage, micro_batches)
        orders.append([0] * warmup + [0, 1] * (micro_batches - warmup) + [1] * warmup)
    ended: list[tuple[list[float], list[float]]] = [([], []) for _ in costs]  # when forwards and backwards of a stage ended
    clocks, position = [0.0] * stages, [0] * stages
    while any(position[stage] < len(orders[stage]) for stage in range(stages)):
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                kind = order[position[stage]]
                micro_batch = len(ended[stage][kind])
                before = stage - 1 if kind == 0 else stage + 1
                if 0 <= before < stages:
                    if len(ended[before][kind]) <= micro_batch:
                        break  # not there yet
                    clocks[stage] = max(clocks[stage], ended[before][kind][micro_batch])
                clocks[stage] += costs[stage][kind]
                ended[stage][kind].append(clocks[stage])
                position[stage] += 1
    whole = max(clocks)
    return [1.0 - micro_batches * sum(cost) / whole for cost in costs]


class StageClock:
    """Measures how long this stage computes: mcore's schedules take it for their `timers` and call it around every pass.

    A pass is a micro-batch's forward or backward on this stage with the collectives inside it. On a GPU events are recorded in the
    current stream, which waits for messages as the passes do; the host waits for nothing before `read`.
    """

    BUSY, ALL = ("forward-compute", "backward-compute"), "forward-backward"  # mcore 0.16.1's names; the others are messages

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._busy = self._whole = self._waited = 0.0
        self._waited_before = 0.0  # seconds in collectives, when the pass under way began
        self._marks: dict[str, list] = {name: [] for name in (*self.BUSY, self.ALL)}  # starts and stops in turn

    def __call__(self, name: str, log_level: int = 0) -> "_Timer":
        """The timer of that name, as mcore asks for it."""
        return _Timer(self, name)

    def mark(self, name: str) -> None:
        """Take note of this moment, on the device's own clock."""
        marks = self._marks.get(name)
        if marks is None:
            return
        if name == self.ALL and len(marks) % 2 == 0 and marks and (not self.on_gpu or marks[-1].query()):  # the step before is done
            self._add_up()
            marks = self._marks[name]
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())

    def begin(self, name: str) -> None:
        """A pass or a message begins."""
        self.mark(name)
        if name in self.BUSY:
            self._waited_before = progress.now.waited

    def end(self, name: str) -> None:
        """It has ended."""
        self.mark(name)
        if name in self.BUSY:
            waited = progress.now.waited - self._waited_before
            self._waited += waited
            progress.now.computed -= waited

    def read(self) -> tuple[float, float, float]:
        """Seconds since the last `read` that this rank was in its passes, that its schedules took, and that it waited in collectives
        within the passes. Waits for the device to be done. On a GPU collectives are not waited for by the host, and count as passes."""
        if self.on_gpu and self._marks[self.ALL]:
            self._marks[self.ALL][-1].synchronize()
        self._add_up()
        found = self._busy, self._whole, self._waited
        self._busy = self._whole = self._waited = 0.0
        return found

    def _add_up(self) -> None:
        """Turn marks into seconds, so that they do not pile up between two `read`s."""
        busy = sum(self._seconds(name) for name in self.BUSY)
        self._busy += busy
        progress.now.computed += busy
        self._whole += self._seconds(self.ALL)

    def _seconds(self, name: str) -> float:
        marks, self._marks[name] = self._marks[name], []
        pairs = list(zip(marks[::2], marks[1::2], strict=True))
        return sum(start.elapsed_time(stop) / 1000 if self.on_gpu else stop - start for start, stop in pairs)


class _Timer:
    """What mcore calls: `start` and `stop`."""

    def __init__(self, clock: StageClock, name: str):
        self.clock, self.name = clock, name

    def start(self, barrier: bool = False) -> None:
        self.clock.begin(self.name)
        if self.name != StageClock.ALL:
            progress.mark(self.name.removesuffix("-compute"), waiting=self.name not in StageClock.BUSY)

    def stop(self) -> None:
        self.clock.end(self.name)
        progress.now.waiting = False


@dataclass(frozen=True)
class Times:
    """Seconds of every rank between two looks at the clocks. stages: its pipeline stage. busy: in passes. own: of these, not waiting in
    collectives. whole: of the schedules; all stages start a step together, and the longest is the time of all passes."""

    stages: list[int]
    busy: list[float]
    whole: list[float]
    own: list[float]

    def of_stage(self, stage: int) -> float:
        """Seconds in passes, mean over the stage's ranks."""
        return statistics.fmean(busy for busy, at in zip(self.busy, self.stages, strict=True) if at == stage)

    @property
    def idle_shares(self) -> list[float]:
        """Share of the passes in which each stage did not compute, mean over its ranks."""
        longest = max(self.whole)
        return [1.0 - self.of_stage(stage) / longest if longest else 0.0 for stage in range(max(self.stages) + 1)]

    @property
    def slowest(self) -> tuple[int, float]:
        """The rank that computes longest beside the median of its stage, which has the same work, and how many times as long."""
        medians = [statistics.median_low(o for o, at in zip(self.own, self.stages, strict=True) if at == stage) for stage in self.stages]
        ratios = [own / median if median > 0 else 1.0 for own, median in zip(self.own, medians, strict=True)]
        slowest = max(range(len(ratios)), key=lambda rank: (ratios[rank], self.own[rank]))
        return slowest, ratios[slowest]


def measured_times(clock: StageClock, groups: Groups) -> Times:
    """Every rank's times since the last call. Called by every rank."""
    busy, whole, waited = clock.read()
    mine = torch.tensor([groups.pp_rank, busy, whole, busy - waited], dtype=torch.float64, device=groups.device)
    all_ranks = mine.new_empty(groups.world_size * len(mine))
    dist.all_gather_into_tensor(all_ranks, mine)
    stages, *seconds = all_ranks.view(groups.world_size, -1).T.tolist()
    return Times([int(stage) for stage in stages], *seconds)

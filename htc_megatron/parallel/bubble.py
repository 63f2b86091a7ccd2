"""The pipeline's bubble: the share of a step's passes in which a stage does not compute, foretold and measured."""

import time
from collections.abc import Sequence

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
        self._busy = self._whole = 0.0
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

    def read(self) -> tuple[float, float]:
        """Seconds this stage computed and seconds its schedules took since the last `read`. Waits for the device to be done."""
        if self.on_gpu and self._marks[self.ALL]:
            self._marks[self.ALL][-1].synchronize()
        self._add_up()
        found = self._busy, self._whole
        self._busy = self._whole = 0.0
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
        self.clock.mark(self.name)
        if self.name != StageClock.ALL:
            progress.mark(self.name.removesuffix("-compute"), waiting=self.name not in StageClock.BUSY)

    def stop(self) -> None:
        self.clock.mark(self.name)
        progress.now.waiting = False


def measured_idle_shares(clock: StageClock, groups: Groups) -> list[float]:
    """Share of the passes since the last call in which each stage did not compute, mean over its ranks. Called by every rank.

    All stages start a step together; the time of all passes is that of the stage that takes longest.
    """
    busy, whole = clock.read()
    seconds = torch.zeros(groups.pp_size, dtype=torch.float64, device=groups.device)
    seconds[groups.pp_rank] = busy
    dist.all_reduce(seconds)
    longest = torch.tensor(whole, dtype=torch.float64, device=groups.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    if not longest:
        return [0.0] * groups.pp_size
    return (1.0 - seconds * groups.pp_size / groups.world_size / longest).tolist()

"""Finds the rank that died, hangs or is slow, names it with its host, and ends the run so that it can begin again.

A thread of each rank tells the others at short intervals, over a store of its own that rank 0 hosts, that it lives and what its main
thread is at (parallel/progress.py). Rank 0 reads all of it; every other rank looks at what rank 0 has found, and at rank 0 itself.

- A rank without a sign of life for life.heartbeat_limit_s is dead, stopped or cut off.
- Where no rank comes forward for life.hang_limit_s, the run hangs: named are the ranks that do not wait for others.
- Where a rank fails because a peer is gone, all look for the one that fell silent at once, without waiting out the limit.
- A rank that computes longer than its pipeline stage's median by life.slow_factor is named, and the run goes on.

In all but the last case each rank writes what it was at and the stacks of its threads to stderr, leaves FAULT in the status file and
ends. A process that is stopped cannot; the launcher ends it (torchrun, srun --kill-on-bad-exit).
"""

import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from htc_megatron.checkpoint import PeerLost
from htc_megatron.cluster.status import FAULT, node_name
from htc_megatron.config import LifeConfig
from htc_megatron.parallel import progress
from htc_megatron.parallel.groups import Groups
from htc_megatron.training.life import ExitStatus, is_sentence

SLOW_STEPS = 5  # steps that ranks are compared over
SILENT = 4  # intervals without a sign of life by which a rank is gone, where another has lost a peer already


def tell(sentence: str) -> None:
    """A line on stderr, whatever stands in its place at the moment."""
    print(f"watchdog: {sentence}", file=sys.__stderr__, flush=True)


class Ranks:
    """What is known of all ranks, by what they said and when something new of each was last heard."""

    def __init__(self, size: int, life: LifeConfig, interval: float):
        self.life, self.interval = life, interval
        self.said: list[dict] = [{} for _ in range(size)]
        self.heard = [time.monotonic()] * size
        self.counts = [(-1, time.monotonic())] * size  # marks of its main thread, and when they changed
        self.slow: dict[int, float] = {}
        self._compared: list[tuple[int, float]] | None = None  # step and seconds of computing of each, when they were last compared

    def hear(self, rank: int, said: dict) -> None:
        moment = time.monotonic()
        if said.get("beat") != self.said[rank].get("beat"):
            self.heard[rank] = moment
        if said.get("count") != self.counts[rank][0]:
            self.counts[rank] = said.get("count"), moment
        self.said[rank] = said

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.said[rank].get('host', 'an unknown host')}"

    def verdict(self) -> str:
        """What is wrong, in a sentence; empty: nothing."""
        moment = time.monotonic()
        here = [rank for rank, said in enumerate(self.said) if not said.get("done")]
        lost_a_peer = [rank for rank in here if self.said[rank].get("error")]
        limit = self.life.heartbeat_limit_s or float("inf")
        if lost_a_peer:
            limit = min(limit, SILENT * self.interval)
        silent = [rank for rank in here if moment - self.heard[rank] > limit]
        if silent:
            names = "; ".join(f"{self.name(rank)}, at last in {self.said[rank].get('at', 'its start')}" for rank in silent)
            return f"no sign of life for {max(moment - self.heard[rank] for rank in silent):.1f} s from {names}"
        still = [moment - self.counts[rank][1] for rank in here]
        if self.life.hang_limit_s and still and min(still) > self.life.hang_limit_s and not lost_a_peer:
            ranks = [rank for rank in here if not self.said[rank].get("waiting")]
            names = "; ".join(f"{self.name(rank)} in {self.said[rank].get('at')}" for rank in ranks)
            return f"no rank has come forward for {min(still):.1f} s; not waiting for others: {names or 'none of them'}"
        return ""

    def slow_ranks(self) -> list[tuple[int, float]]:
        """Ranks that took longer to compute than the median of their stage by the factor, and how many times as long, once in
        SLOW_STEPS steps of all; none in between."""
        figures = [(said.get("step", 0), said.get("computed", 0.0)) for said in self.said]
        before = self._compared
        if before is None or min(step for step, _ in figures) < min(step for step, _ in before) + SLOW_STEPS:
            self._compared = before or figures
            return []
        self._compared = figures
        seconds = [(now - then) / max(step - last, 1) for (step, now), (last, then) in zip(figures, before, strict=True)]
        found = []
        for rank, mine in enumerate(seconds):
            median = statistics.median_low(
                [s for s, said in zip(seconds, self.said, strict=True) if said["stage"] == self.said[rank]["stage"]]
            )
            if self.life.slow_factor and median > 0 and mine > self.life.slow_factor * median:
                found.append((rank, mine / median))
        return found


class Watchdog:
    """Watches over a run as a context: made by all ranks once their groups are there, and left by all of them alike.

    An exception that is a fault leaves through `mourn`, which finds out whose end it was.
    """

    def __init__(self, groups: Groups, life: LifeConfig, status: ExitStatus, end: Callable[[int], None] = os._exit):
        self.groups, self.life, self.status, self.end = groups, life, status, end
        limits = [limit for limit in (life.heartbeat_limit_s, life.hang_limit_s) if limit]
        self.interval = min(5.0, min(limits, default=0.0) / 10)
        self._leaving, self._error, self._beat = threading.Event(), "", 0
        self._host = node_name()
        self.store = self.thread = None
        self._found, self._good = "", 0.0  # what is wrong, if anything; when the store last answered

    def __enter__(self) -> "Watchdog":
        if not self.interval:
            return self
        where: list[object] = [os.environ["MASTER_ADDR"], 0]
        timeout = timedelta(seconds=max(1.0, self.life.heartbeat_limit_s or self.life.hang_limit_s))
        if self.groups.rank == 0:
            self._server = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timeout)
            where[1] = self._server.port
        dist.broadcast_object_list(where, src=0, group=self.groups.checkpoint)
        self.store = dist.TCPStore(*where, is_master=False, timeout=timeout)
        self.ranks = Ranks(self.groups.world_size, self.life, self.interval)
        self._say()
        dist.barrier(self.groups.checkpoint)  # every rank's key is there
        self._good = time.monotonic()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._talker = threading.Thread(target=self._talk, name="watchdog's signs of life", daemon=True)
        self.thread.start()
        self._talker.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._leaving.set()
        if self.thread is not None:
            self.thread.join(self.interval * SILENT)
            self._talker.join(self.interval * SILENT)

    def mourn(self, error: BaseException) -> None:
        """A fault has ended this rank's work, a peer's death as likely as not: give the ranks the time to find out whose, in which case
        this does not return."""
        if self.thread is not None and (not is_sentence(error) or isinstance(error.__cause__, PeerLost)):
            self._error = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            self.thread.join(self.interval * (3 * SILENT))

    def _say(self) -> None:
        now, self._beat = progress.now, self._beat + 1
        said = {"beat": self._beat, "host": self._host, "at": str(now), "count": now.count, "waiting": now.waiting, "step": now.step}
        said |= {"computed": now.computed, "stage": self.groups.pp_rank, "error": self._error, "done": self._leaving.is_set()}
        self.store.set(f"rank{self.groups.rank}", json.dumps(said))

    def _talk(self) -> None:
        """Exchange signs of life at short intervals. Beside the thread that judges them: a store whose host is stopped, and not dead,
        takes a question and never answers, whatever the store's own limit (torch 2.13.0 waits for the answer to its own giving up)."""
        rank, size = self.groups.rank, self.groups.world_size
        while not self._leaving.wait(self.interval):
            try:
                self._say()
                for other in range(size) if rank == 0 else (0,):
                    self.ranks.hear(other, json.loads(self.store.get(f"rank{other}")))
                found = self.ranks.verdict() if rank == 0 else self._found_by_first()
                if rank == 0:
                    self._name_slow()
                    if found:
                        self.store.set("verdict", found)
                self._found, self._good = found, time.monotonic()
            except (RuntimeError, OSError):
                continue  # rank 0, which has the store, is gone, stopped or cut off; or leaves a little before this rank does
        try:
            self._say()  # this rank leaves in order
        except (RuntimeError, OSError):
            return  # rank 0 has left before

    def _watch(self) -> None:
        while not self._leaving.wait(self.interval):
            limit = SILENT * self.interval if self._error else self.life.heartbeat_limit_s or self.life.hang_limit_s
            found, silent = self._found, time.monotonic() - self._good
            if not found and silent > limit:
                found = f"no sign of life for {silent:.1f} s from {self.ranks.name(0)}, at last in {self.ranks.said[0].get('at')}"
            if found:
                self._end_all(found)

    def _found_by_first(self) -> str:
        """What rank 0 has found, or that nothing is heard of it though its store answers."""
        if self.store.check(["verdict"]):
            return self.store.get("verdict").decode()
        moment, limit = time.monotonic(), self.life.heartbeat_limit_s
        if limit and not self.ranks.said[0].get("done") and moment - self.ranks.heard[0] > limit + 2 * self.interval:
            return f"no sign of life for {moment - self.ranks.heard[0]:.1f} s from {self.ranks.name(0)}"
        return ""

    def _name_slow(self) -> None:
        for rank, times in self.ranks.slow_ranks():
            tell(f"{self.ranks.name(rank)} computes {times:.1f} times as long as the median of its stage")

    def _end_all(self, found: str) -> None:
        self.status.write(FAULT)
        stderr = sys.__stderr__
        mine = f"rank {self.groups.rank} on {self._host} was in {progress.now}"
        tell(f"{found}\nwatchdog: {mine}; {self._error or 'its threads:'}")
        faulthandler.dump_traceback(stderr, all_threads=True)
        stderr.flush()
        if self.groups.rank == 0:
            time.sleep(2 * self.interval)  # so that the others read what it has found
        self.end(FAULT)
        self._leaving.set()

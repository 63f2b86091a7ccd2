"""A run of the entry point over as many lives as it takes, on this machine, with faults made to happen in them.

Ranks are forked from this process, which must have imported everything and made no process group: a life costs a second or two.
"""

import os
import runpy
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from htc_megatron.cluster.status import EXIT_FILE, FAULT, STOPPED
from htc_megatron.parallel import progress
from htc_megatron.training import trainer

ENTRY = Path(__file__).parent.parent.parent / "pretrain" / "pretrain_htc.py"
LOSSES = "losses.txt"  # of the first rank: step, loss and gradient norm, exactly
PHASES = ("data", "forward", "backward", "reduce", "step", "save")


@dataclass(frozen=True)
class FaultAt:
    """A signal to one rank as its main thread begins the `count`-th `phase` of `step`, or `delay` seconds later."""

    rank: int
    step: int
    phase: str
    count: int = 1
    delay: float = 0.0
    number: int = signal.SIGKILL

    def __str__(self) -> str:
        return f"{signal.Signals(self.number).name} to rank {self.rank} in {self.phase} {self.count} of step {self.step}"

    def arm(self) -> None:
        """Have it happen in this process."""
        left = self.count

        def listen(phase: str) -> None:
            nonlocal left
            if phase == self.phase and progress.now.step == self.step:
                left -= 1
                if left == 0 and self.delay:
                    threading.Timer(self.delay, os.kill, (os.getpid(), self.number)).start()
                elif left == 0:
                    os.kill(os.getpid(), self.number)

        progress.listeners.append(listen)


@dataclass(frozen=True)
class Life:
    """status: what the run left. ends: of each rank, an exit status or minus a signal. first_end, last_end: seconds after its start.
    logs: what each rank wrote. fallen: ranks that the supervisor had to kill."""

    status: int
    ends: tuple[int, ...]
    first_end: float
    last_end: float
    logs: tuple[str, ...]
    fallen: tuple[int, ...]


def live(arguments: list[str], output_dir: Path, world_size: int, fault: FaultAt | None, limit: float, grace: float = 30.0) -> Life:
    """One life of a run: `world_size` ranks of the entry point with these arguments.

    grace: seconds that ranks get to end by themselves after the first has ended, or was stopped; then they are killed, as a launcher
    does. limit: seconds for all of it; a life that takes longer is killed and raises TimeoutError with its ranks' logs.
    """
    status_file = output_dir / EXIT_FILE
    status_file.unlink(missing_ok=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    logs = [output_dir / f"rank{rank}.log" for rank in range(world_size)]
    began = time.monotonic()
    ranks = {_fork(rank, world_size, store.port, arguments, output_dir, logs[rank], fault): rank for rank in range(world_size)}
    ends: dict[int, int] = {}
    times: list[float] = []
    fallen: list[int] = []
    while len(ends) < world_size:
        pid, code = os.waitpid(-1, os.WNOHANG | os.WUNTRACED) if ranks else (0, 0)
        moment = time.monotonic() - began
        if pid in ranks and os.WIFSTOPPED(code):
            times.append(moment)
        elif pid in ranks:
            ends[ranks[pid]] = os.waitstatus_to_exitcode(code)
            times.append(moment)
        left = [(pid, rank) for pid, rank in ranks.items() if rank not in ends]
        stopped_alone = times and len(left) == 1 and fault is not None and fault.number == signal.SIGSTOP and left[0][1] == fault.rank
        if left and (moment > limit or stopped_alone or (times and moment - times[0] > grace)):
            for pid, rank in left:
                fallen.append(rank)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ends[rank] = -signal.SIGKILL
            times.append(moment)
        elif pid == 0:
            time.sleep(0.01)
    texts = tuple(log.read_text(errors="replace") for log in logs)
    if times[-1] > limit:
        tails = "\n".join(f"--- rank {rank}\n{text[-3000:]}" for rank, text in enumerate(texts))
        raise TimeoutError(f"a life with {fault or 'no fault'} took longer than {limit:g} s\n{tails}")
    status = int(status_file.read_text()) if status_file.exists() else FAULT  # a crash that left none
    return Life(status, tuple(ends[rank] for rank in range(world_size)), times[0], times[-1], texts, tuple(fallen))


def begins_again(status: int) -> bool:
    """What the job script does with a status."""
    return status in (FAULT, STOPPED)


def losses(output_dir: Path) -> dict[int, str]:
    """Of each step its loss and gradient norm as written last; a step that was made again stands once."""
    path = output_dir / LOSSES
    lines = path.read_text().splitlines() if path.exists() else []
    return {int(line.split()[0]): line for line in lines}


def _fork(rank: int, size: int, port: int, arguments: list[str], output_dir: Path, log: Path, fault: FaultAt | None) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        progress.listeners.clear()
        if fault is not None and fault.rank == rank:
            fault.arm()
        if rank == 0:
            _write_losses(output_dir / LOSSES)
        sys.argv = [str(ENTRY), *arguments]
        code = runpy.run_path(str(ENTRY))["main"]()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _write_losses(path: Path) -> None:
    step = trainer.train_step

    def written(engine, batches, lr, *more):
        result = step(engine, batches, lr, *more)
        with open(path, "a") as file:
            file.write(f"{progress.now.step} {result.loss.hex()} {result.grad_norm.hex()}\n")
        return result

    trainer.train_step = written

"""Multi-process tests: persistent ranks on gloo that run one job after the other.

    def job(scale):                       # at module level of a test file; runs on every rank
        x = torch.ones(1) * scale
        dist.all_reduce(x)
        return x.item()

    def test_sum(ranks):
        assert ranks(4).run(job, 2.0) == [8.0] * 4

Importing torch, DeepSpeed and megatron-core takes seconds; the workers are forked from a server that has done it once,
and serve many jobs. Every job gets a fresh process group and is followed by a full reset (tests/worker.py). A job with a
rank that raises, dies or hangs ends with RankFailure or RankTimeout, which hold each rank's traceback or stacks; its
processes are killed and replaced.
"""

import atexit
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.worker import STACK_SIGNAL, Answer, Job, serve

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",  # the same tests on every machine
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "RES_OPTIONS": "timeout:1 attempts:1",  # torch looks up the name of every peer, and a lost DNS packet would cost 5 seconds a job
    **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),  # a host name that does not resolve must not matter
}
PRELOAD = [  # what any job imports, so that no new worker takes a second for it; nothing of ours, which the job's own path decides
    "pytest",
    "torch",
    "torch.distributed",
    "torch.utils.tensorboard",
    "deepspeed",
    "megatron.core.models.gpt",
    "megatron.core.pipeline_parallel.schedules",
    "transformers.generation",
    "transformers.image_processing_utils",
    "transformers.processing_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
]
JOBS_PER_WORKER = 40  # what libraries keep from job to job in their modules must not grow without end
GRACE = 4.0  # seconds the other ranks get to answer after one has failed: most errors come from all ranks at once
LOG_TAIL = 6000  # characters of a rank's output shown with a failure


class RankFailure(RuntimeError):
    """At least one rank raised or died. `errors[rank]` is its traceback, `exceptions[rank]` the exception where it pickles."""

    def __init__(self, message: str, errors: dict[int, str], exceptions: dict[int, BaseException]):
        super().__init__(message)
        self.errors, self.exceptions = errors, exceptions


class RankTimeout(RankFailure):
    """The job took longer than its limit; the message holds the stacks of the ranks that had not answered."""


class Worker:
    """A process, the pipe to it and the file its output goes to."""

    def __init__(self, context: multiprocessing.context.BaseContext, folder: Path, index: int):
        self.jobs = 0
        self.log = folder / f"rank{index}.log"
        self.log.unlink(missing_ok=True)
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        their_end, self.lifeline = context.Pipe(duplex=False)  # closes with this process, and the worker then ends
        self.process = context.Process(target=serve, args=(theirs, their_end, str(self.log)), name=f"rank{index}")
        self.process.start()
        theirs.close()
        their_end.close()

    def send(self, job: Job) -> None:
        self.jobs += 1
        with suppress(OSError):  # a dead worker is reported by the end of file on its pipe
            self.connection.send_bytes(pickle.dumps(job))

    def release(self) -> None:
        with suppress(OSError):
            self.connection.send_bytes(b"release")

    def receive(self) -> Answer | None:
        """The worker's answer; None if it died."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return None

    def stacks(self) -> str:
        """Stacks of all threads, written by the worker itself or, if it cannot, read by py-spy."""
        before = self.log.stat().st_size if self.log.exists() else 0
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, STACK_SIGNAL)
        last, until = before, time.monotonic() + 2
        while time.monotonic() < until:
            time.sleep(0.1)
            size = self.log.stat().st_size if self.log.exists() else 0
            if size > before and size == last:
                return self.output()[before:]
            last = size
        spy = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
        if spy is None:
            return "(no stack: the process does not answer, and py-spy is not installed)\n"
        command = [spy, "dump", "--nonblocking", "--pid", str(self.process.pid)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except subprocess.TimeoutExpired:
            return "(no stack: neither the process nor py-spy answers)\n"
        return done.stdout + done.stderr

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.join(10)
        self.connection.close()
        self.lifeline.close()


class Pool:
    """Persistent worker processes. Made once a test session; `run` uses the first `world_size` of them."""

    def __init__(self):
        os.environ.update(ENVIRONMENT)  # the fork server and every worker inherit it
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.workers: dict[int, Worker] = {}
        atexit.register(self.close)  # before multiprocessing's own exit handler, which would wait for the workers

    def run(
        self,
        world_size: int,
        function: Callable | str,
        *args: Any,
        timeout: float = 120.0,
        init: bool = True,
        env: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `function(*args, **kwargs)` on `world_size` ranks and return their values in rank order.

        function: a function at module level, or its "module:name". Arguments and values are pickled.
        timeout: seconds for the whole job. init: whether the default gloo process group is made before the call; without
        it the function makes its own, from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (once: a job has one store).
        Raises RankFailure if a rank raises or dies, RankTimeout if the limit passes.
        """
        from torch.distributed import TCPStore

        name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        if "<" in name:
            raise ValueError(f"{name} cannot run on other processes: it must be a function at module level")
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        payload = pickle.dumps((args, kwargs))
        for index in range(world_size):
            worker = self.workers.get(index)
            if worker is not None and (worker.jobs >= JOBS_PER_WORKER or not worker.process.is_alive()):
                self._kill([index])
            if index not in self.workers:
                self.workers[index] = Worker(self.context, self.folder, index)
        try:
            for rank in range(world_size):
                job = Job(name, payload, rank, world_size, store.port, init, timeout, env or {}, list(sys.path), os.getcwd())
                self.workers[rank].send(job)
            answers = self._collect(name, world_size, time.monotonic() + timeout, timeout)
            self.output = [self.workers[rank].output() for rank in range(world_size)]
            for rank in range(world_size):
                self.workers[rank].release()
            self._collect(f"the teardown after {name}", world_size, time.monotonic() + 60, 60)
        except BaseException:
            self._kill(range(world_size))
            raise
        return [pickle.loads(answers[rank].data) for rank in range(world_size)]

    def _collect(self, name: str, world_size: int, deadline: float, limit: float) -> dict[int, Answer]:
        """Every rank's answer, or the failure."""
        answers: dict[int, Answer] = {}
        errors: dict[int, str] = {}
        exceptions: dict[int, BaseException] = {}
        while len(answers) + len(errors) < world_size:
            waiting = {self.workers[r].connection: r for r in range(world_size) if r not in answers and r not in errors}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection]
                answer = self.workers[rank].receive()
                if answer is not None and answer.kind != "error":
                    answers[rank] = answer
                    continue
                if answer is None:
                    errors[rank] = self._death(rank)
                else:
                    errors[rank] = answer.text
                    if answer.data:
                        exceptions[rank] = pickle.loads(answer.data)
                deadline = min(deadline, time.monotonic() + GRACE)
        if len(answers) == world_size:
            return answers
        return self._fail(name, world_size, limit, answers, errors, exceptions)

    def _fail(self, name: str, world_size: int, limit: float, answers: dict, errors: dict, exceptions: dict) -> dict[int, Answer]:
        silent = [rank for rank in range(world_size) if rank not in answers and rank not in errors]
        if errors:
            lines = [f"{name} failed on rank {', '.join(map(str, errors))} of {world_size}"]
        else:
            lines = [f"{name} took longer than {limit:g} s: no answer from rank {', '.join(map(str, silent))} of {world_size}"]
        for rank, text in errors.items():
            lines.append(f"--- rank {rank}\n{text.rstrip()}")
            output = self.workers[rank].output().strip()
            if output and output not in text:
                lines.append(f"--- rank {rank}, its output\n{output[-LOG_TAIL:]}")
        for rank in silent:
            output = self.workers[rank].output().strip()[-LOG_TAIL:]
            lines.append(f"--- rank {rank}, still running\n{output}\n{self.workers[rank].stacks().rstrip()}")
        kind = RankFailure if errors else RankTimeout
        failure = kind("\n".join(lines), errors, exceptions)
        raise failure from next(iter(exceptions.values()), None)

    def _death(self, rank: int) -> str:
        process = self.workers[rank].process
        process.join(5)
        code = process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        return f"rank {rank} died: {how}\n{self.workers[rank].output()[-LOG_TAIL:]}"

    def _kill(self, ranks: Any) -> None:
        for rank in ranks:
            worker = self.workers.pop(rank, None)
            if worker is not None:
                worker.kill()

    def restart(self) -> None:
        """Kill all workers; the next job starts new ones."""
        self._kill(list(self.workers))

    def close(self) -> None:
        """Kill all workers and remove their logs."""
        self.restart()
        shutil.rmtree(self.folder, ignore_errors=True)


class Ranks:
    """`pool` seen with a fixed number of ranks: what the fixture `ranks(n)` returns."""

    def __init__(self, pool: Pool, world_size: int):
        self.pool, self.world_size = pool, world_size

    def run(self, function: Callable | str, *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """See Pool.run."""
        return self.pool.run(self.world_size, function, *args, timeout=timeout, **kwargs)

    def restart(self) -> None:
        """End all workers: the next job runs in new processes, as a resumed run does."""
        self.pool.restart()

    @property
    def output(self) -> list[str]:
        """What each rank of the last job wrote to stdout and stderr."""
        return self.pool.output

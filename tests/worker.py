"""One rank of the test harness: a process that imports torch, DeepSpeed and megatron-core once and then runs job after job.

`serve` is what a worker process runs. It talks to tests/distributed.py over a pipe: a job comes in, its answer goes out,
and only when every rank has answered does the release come that tears the process group down.
"""

import faulthandler
import gc
import importlib
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

STACK_SIGNAL = signal.SIGUSR2  # makes a worker write the stacks of all its threads into its log, even inside a C call
# What zero.Init keeps for the life of a process: it numbers parameters (ranks compare the numbers) and counts the persistent ones.
ZERO_INIT_STATE = {"param_id": 0, "num_persisted_parameters": 0, "num_persisted_elements": 0, "apply_param_persistence": False}


@dataclass
class Job:
    """What one rank is asked to do. `payload` is the pickled (args, kwargs), opened only after sys_path is set."""

    function: str  # "module:qualified.name"
    payload: bytes
    rank: int
    world_size: int
    port: int  # of the TCPStore on which the ranks meet; the parent hosts it
    init: bool  # make the default gloo process group before the call
    timeout: float  # seconds
    env: dict[str, str] = field(default_factory=dict)
    sys_path: list[str] = field(default_factory=list)
    cwd: str = "."


@dataclass
class Answer:
    """What a rank says: kind "value" (pickled value), "error" (traceback text, pickled exception or b"") or "ready"."""

    kind: str
    data: bytes = b""
    text: str = ""


def serve(connection: Connection, lifeline: Connection, log_path: str) -> None:
    """Run jobs from `connection` until the other end closes. stdout and stderr go to the file `log_path`.

    lifeline: a pipe on which nothing is ever sent; its end is the parent's, however that came about.
    """
    threading.Thread(target=_die_with_parent, args=(lifeline,), name="lifeline", daemon=True).start()
    with suppress(AttributeError, OSError):  # as htc_megatron/parallel/host_threads.py, which comes too late for the harness's groups
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's to handle: it kills the workers
    log = os.open(log_path, os.O_CREAT | os.O_RDWR | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.enable(file=log)
    faulthandler.register(STACK_SIGNAL, file=log, all_threads=True)
    _import_libraries()
    environment = dict(os.environ)
    gc.collect()
    gc.freeze()  # the libraries' objects never die: keep the collection after every job short
    while True:
        try:
            job: Job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        os.ftruncate(log, 0)
        _say(connection, _run(job))
        try:
            connection.recv_bytes()  # every rank has answered: nobody still needs this rank's sockets
        except EOFError:
            return
        _say(connection, _tear_down(environment))


def reset_distributed() -> None:
    """Forget every process group: torch's, and what megatron-core and DeepSpeed keep of them in their modules."""
    import torch.distributed as dist
    from deepspeed.comm import comm as ds_comm
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups as ds_groups
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.tensor_parallel import random as mcore_random

    FWD_MODULE_STACK.clear()  # every ZeRO-3 engine leaves its model there, and with it all of itself
    gc.collect()  # engines and buckets hold process groups in reference cycles
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    mcore_random._CUDA_RNG_STATE_TRACKER = None
    mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    for name, value in ZERO_INIT_STATE.items():
        setattr(Init, name, value)
    (modules_seen,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    modules_seen[0] = 0  # ZeRO-3 compares module numbers between ranks; workers have built different numbers of them
    ds_groups._release_process_group_references()
    ds_comm.cdb = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _import_libraries() -> None:
    import deepspeed
    import megatron.core.models.gpt  # noqa: F401
    import megatron.core.parallel_state  # noqa: F401
    import megatron.core.pipeline_parallel.schedules  # noqa: F401
    import torch

    # A test that is killed while DeepSpeed compiles this op would leave a lock on which every later run waits.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)


def _run(job: Job) -> Answer:
    try:
        os.environ.update(
            RANK=str(job.rank),
            WORLD_SIZE=str(job.world_size),
            LOCAL_RANK=str(job.rank),
            LOCAL_WORLD_SIZE=str(job.world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(job.port),
            TORCHELASTIC_USE_AGENT_STORE="True",  # as under torchrun: rank 0 hosts no store, so no port is ever raced for
            **job.env,
        )
        sys.path[:] = job.sys_path
        os.chdir(job.cwd)
        _fresh_state()
        args, kwargs = pickle.loads(job.payload)
        module, _, name = job.function.partition(":")
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        if job.init:
            import torch.distributed as dist

            dist.init_process_group("gloo", timeout=timedelta(seconds=2 * job.timeout + 60))  # the parent's limit comes first
        return Answer("value", pickle.dumps(function(*args, **kwargs)))
    except BaseException as error:  # SystemExit too: whatever ends a job is reported, and the worker lives on
        return _error(error)


def _tear_down(environment: dict[str, str]) -> Answer:
    try:
        reset_distributed()
        os.environ.clear()
        os.environ.update(environment)
        return Answer("ready")
    except BaseException as error:
        return _error(error)


def _fresh_state() -> None:
    """The same global state at the start of every job, whatever ran before it in this process."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)


def _error(error: BaseException) -> Answer:
    text = "".join(traceback.format_exception(error))
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # some exceptions pickle and do not come back
    except Exception:
        data = b""
    return Answer("error", data, text)


def _say(connection: Connection, answer: Answer) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send_bytes(pickle.dumps(answer))


def _die_with_parent(lifeline: Connection) -> None:
    lifeline.poll(None)
    os._exit(1)

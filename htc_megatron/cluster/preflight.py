"""What is looked at before any GPU-hour is spent: every rank reaches every other, clocks, disk, paths, and one all-reduce.

Each rank opens a port on the network that leads to rank 0, tells it to the others through a store on rank 0 and calls every other
rank there. A rank that cannot be reached is named with its node, within a time limit. Neither DeepSpeed nor Megatron-core is imported.
"""

import json
import os
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from htc_megatron.checkpoint.folder import latest
from htc_megatron.cluster.report import describe, environment
from htc_megatron.cluster.status import FAULT, FINISHED, REFUSED, node_name
from htc_megatron.config import RunConfig
from htc_megatron.parallel.launch import Launch, own_address

CALLS = 32  # threads that call other ranks
CALL_S = 10.0  # seconds one call may take
FILES = 64  # of a folder, opened to see that they can be read
TOKEN = ".preflight_"


@dataclass(frozen=True)
class Limits:
    seconds: float = 120.0  # for all ranks to come, and for each part after that
    clock_skew_s: float = 5.0
    min_free_gib: float = 10.0  # or two checkpoints like the last one, if that is more


@dataclass
class Findings:
    """What one rank found. paths: what may be wrong for the whole run; machine: what is wrong with this node or its network."""

    node: str
    paths: list[str] = field(default_factory=list)
    machine: list[str] = field(default_factory=list)
    sizes: dict[str, str] = field(default_factory=dict)  # of what is read, which must be the same on every node
    environment: dict[str, str] = field(default_factory=dict)


def preflight(config: RunConfig, launch: Launch, limits: Limits, clock: Callable[[], float] = time.time) -> tuple[int, list[str]]:
    """Check this rank and, on rank 0, gather what all have found. Called by every rank; all get the same.

    Returns an exit status (FINISHED: all is well; REFUSED: the user must mend something; FAULT: other nodes may do better) and lines
    for the user: the environment, then what is wrong.
    """
    part = ["the meeting"]
    alarm = threading.Timer(3 * limits.seconds + 30, _give_up, (launch, part))  # NCCL may hang where no timeout of torch reaches
    alarm.daemon = True
    alarm.start()
    try:
        return _preflight(config, launch, limits, clock, part)
    finally:
        alarm.cancel()


def _give_up(launch: Launch, part: list[str]) -> None:
    print(f"preflight: rank {launch.rank} on node {node_name()} got no further than {part[0]}", file=sys.stderr, flush=True)
    os._exit(FAULT)


def _preflight(config: RunConfig, launch: Launch, limits: Limits, clock: Callable[[], float], part: list[str]) -> tuple[int, list[str]]:
    hosts_store = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun's agent hosts one itself
    limit = timedelta(seconds=limits.seconds)
    try:
        base = dist.TCPStore(launch.address, launch.port, launch.world_size, hosts_store, limit, wait_for_workers=False)
        store = dist.PrefixStore(f"preflight_{os.environ.get('SLURM_RESTART_COUNT', 0)}", base)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        return FAULT, [f"rank {launch.rank} on node {node_name()} cannot reach rank 0 at {launch.address}:{launch.port} ({reason})"]
    found = Findings(node_name(), environment=environment())
    output_dir = Path(config.output_dir)
    with _Answering(own_address(launch), clock) as server:
        token = ""  # rank 0's file in output_dir, if it could be written
        if launch.rank == 0:
            token = f"{TOKEN}{uuid.uuid4().hex}"
            failures = list(_write_token(output_dir, token))
            found.paths += failures
            token = "" if failures else token
        hello = {"node": found.node, "address": server.address, "port": server.port, "token": token}
        store.set(f"hello/{launch.rank}", json.dumps(hello))
        others, absent = _meet(store, launch, limits.seconds)
        if launch.rank == 0:
            found.machine += [f"rank {rank} has not come within {limits.seconds:g} s" for rank in absent]
        part[0] = "calling the other ranks"
        found.machine += _call(launch, others, found.node, limits, clock)
        part[0] = "looking at paths"
        token = others.get(0, hello)["token"]
        found.paths += _paths(config, found)
        found.paths += _disk(output_dir, limits)
        if launch.rank and token:
            found.machine += _shared(output_dir, token, launch.rank, min(CALL_S, limits.seconds / 2))
        store.set(f"found/{launch.rank}", json.dumps(vars(found)))
        part[0] = "gathering what the others found"
        verdict = (
            _gather(store, launch, limits, absent, output_dir, token) if launch.rank == 0 else _await(store, "verdict", 2 * limits.seconds)
        )
        if verdict is None:
            return FAULT, [f"rank {launch.rank} on node {found.node} heard nothing more from rank 0"]
        if verdict[0] == FINISHED and launch.world_size > 1:
            part[0] = f"an all-reduce over {_backend()}"
            verdict = _all_reduce(base, launch, limit, verdict[1])
    if hosts_store:
        for rank in range(1, launch.world_size):  # the store ends with this process
            _await(store, f"bye/{rank}", 10.0 if rank not in absent else 0.0)
    else:
        store.set(f"bye/{launch.rank}", "null")
    return verdict[0], verdict[1]


class _Answering:
    """A port on which this rank tells the others its time, for as long as the block lasts."""

    def __init__(self, address: str, clock: Callable[[], float]):
        self.address, self.clock = address, clock
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.bind((address, 0))
        self.socket.listen(4096)
        self.port = self.socket.getsockname()[1]

    def __enter__(self) -> "_Answering":
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
                with connection:
                    connection.sendall(f"{self.clock()!r}\n".encode())
            except OSError:
                if self.socket.fileno() < 0:
                    return


def _await(store: dist.Store, key: str, seconds: float):
    """The value of a key, read from JSON; None if nobody sets it in time, or the store is gone."""
    try:
        store.wait([key], timedelta(seconds=max(seconds, 0.01)))
        return json.loads(store.get(key))
    except (RuntimeError, OSError):
        return None


def _meet(store: dist.Store, launch: Launch, seconds: float) -> tuple[dict[int, dict], list[int]]:
    """What the other ranks said of themselves, and the ranks that did not come in time."""
    until, others = time.monotonic() + seconds, {}
    for rank in range(launch.world_size):
        if rank != launch.rank:
            others[rank] = _await(store, f"hello/{rank}", until - time.monotonic())
    return {rank: one for rank, one in others.items() if one is not None}, [rank for rank, one in others.items() if one is None]


def _call(launch: Launch, others: dict[int, dict], node: str, limits: Limits, clock: Callable[[], float]) -> Iterator[str]:
    """Call every other rank, and compare this clock with rank 0's."""

    def call(item: tuple[int, dict]) -> str:
        rank, other = item
        place = f"rank {rank} on node {other['node']} at {other['address']}:{other['port']}"
        try:
            with socket.create_connection((other["address"], other["port"]), timeout=min(CALL_S, limits.seconds)) as connection:
                sent = clock()
                answer = connection.makefile().readline()
                received = clock()
                theirs = float(answer)
        except (OSError, ValueError) as error:
            return f"rank {launch.rank} on node {node} cannot reach {place} ({error})"
        apart = abs((sent + received) / 2 - theirs) - (received - sent) / 2  # less what the way may have taken
        if rank == 0 and apart > limits.clock_skew_s:
            return f"node {node}: its clock is {apart:.1f} s apart from node {other['node']}'s, wanted at most {limits.clock_skew_s:g} s"
        return ""

    with ThreadPoolExecutor(CALLS) as pool:
        yield from filter(None, pool.map(call, others.items()))


def _paths(config: RunConfig, found: Findings) -> Iterator[str]:
    """What is wrong with the paths that the run reads; sizes go into `found`."""
    wanted = {"data.train": config.data.train, "data.validation": config.data.validation, "tokenizer": config.tokenizer}
    wanted["init_from"] = config.init_from
    if config.model.has_mgvq:
        wanted["mgvq_checkpoint"] = config.mgvq_checkpoint
    if not config.data.train:
        yield "data.train is empty: name a folder written by tools/prepare_data.py"
    for key, name in wanted.items():
        if not name:
            continue
        try:
            found.sizes[key] = _size(Path(name))
        except OSError as error:
            yield f"{key}: {error.filename or name} cannot be read ({error.strerror})"
    cache = Path(config.data.feature_cache or ".")
    if config.data.feature_cache and not os.access(cache if cache.exists() else cache.parent, os.W_OK):
        yield f"data.feature_cache: {cache} cannot be written"


def _size(path: Path) -> str:
    """How many files and bytes lie at `path`. Raises OSError if they cannot be read."""
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    for file in files[:FILES]:
        with open(file, "rb") as opened:
            opened.read(1)
    return f"{len(files)} files, {sum(file.stat().st_size for file in files)} bytes"


def _write_token(output_dir: Path, token: str) -> Iterator[str]:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / token).write_text(token)
    except OSError as error:
        yield f"output_dir: {output_dir} cannot be written ({error.strerror})"


def _disk(output_dir: Path, limits: Limits) -> Iterator[str]:
    """Whether a checkpoint will find room."""
    try:
        free = shutil.disk_usage(output_dir).free / 2**30
        last = latest(output_dir / "checkpoints")
        wanted = 0.0 if last is None else 2 * sum(file.stat().st_size for file in last.iterdir()) / 2**30
    except OSError:
        return  # that it is not there is said where the token is looked for
    if free < max(wanted, limits.min_free_gib):
        what = "two checkpoints like the last one" if wanted > limits.min_free_gib else "as asked for"
        yield f"output_dir: {output_dir} has {free:.1f} GiB free, wanted {max(wanted, limits.min_free_gib):.1f} ({what})"


def _shared(output_dir: Path, token: str, rank: int, seconds: float) -> Iterator[str]:
    """Whether rank 0's file is seen here, and this rank can write one beside it."""
    until = time.monotonic() + seconds  # a network file system may show it late
    while not (output_dir / token).is_file():
        if time.monotonic() > until:
            yield f"output_dir: {output_dir} on node {node_name()} lacks what rank 0 wrote there; wanted one file system for all nodes"
            return
        time.sleep(0.2)
    try:
        (output_dir / f"{token}_{rank}").write_text(token)
    except OSError as error:
        yield f"output_dir: {output_dir} on node {node_name()} cannot be written ({error.strerror})"


def _gather(store: dist.Store, launch: Launch, limits: Limits, absent: list[int], output_dir: Path, token: str) -> tuple[int, list[str]]:
    """On rank 0: what all ranks found, as the verdict that all get."""
    until, found, machine = time.monotonic() + limits.seconds, {}, []
    for rank in range(launch.world_size):
        if rank in absent:
            continue
        one = _await(store, f"found/{rank}", until - time.monotonic())
        if one is None:
            machine.append(f"rank {rank} came, and then was not heard of for {limits.seconds:g} s")
        else:
            found[rank] = Findings(**one)
    for file in output_dir.glob(f"{token}*") if token else ():
        file.unlink(missing_ok=True)
    nodes = {one.node: one for one in found.values()}
    refused = []
    for sentence in dict.fromkeys(sentence for one in found.values() for sentence in one.paths):
        having = [f"{rank} on node {one.node}" for rank, one in found.items() if sentence in one.paths]
        if len(having) == len(found):  # the path itself is wrong, and no other node would do better
            refused.append(sentence)
        else:
            machine.append(f"{sentence}: so on rank {', '.join(having)}, and not on the others")
    for key in dict.fromkeys(key for one in found.values() for key in one.sizes):
        sizes = {one.sizes[key]: one.node for one in reversed(found.values()) if key in one.sizes}
        if len(sizes) > 1:
            machine.append(f"{key} is not the same everywhere: " + "; ".join(f"{size} on node {node}" for size, node in sizes.items()))
    machine += [sentence for one in found.values() for sentence in one.machine]
    lines = describe(launch, {name: one.environment for name, one in nodes.items()}) + refused + list(dict.fromkeys(machine))
    verdict = (REFUSED if refused else FAULT if machine else FINISHED, lines)
    store.set("verdict", json.dumps(verdict))
    return verdict


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _all_reduce(store: dist.Store, launch: Launch, limit: timedelta, lines: list[str]) -> tuple[int, list[str]]:
    """One sum over all ranks, by the library that training will use."""
    try:
        device = torch.device("cuda", launch.local_rank) if _backend() == "nccl" else torch.device("cpu")
        dist.init_process_group(
            _backend(), store=dist.PrefixStore("all_reduce", store), rank=launch.rank, world_size=launch.world_size, timeout=limit
        )
        try:
            count = torch.ones(1, device=device)
            dist.all_reduce(count)
            total = int(count.item())
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:
        told = lines if launch.rank == 0 else []  # the others' lines are their own
        reason = str(error).splitlines()[0]
        return FAULT, [*told, f"rank {launch.rank} on node {node_name()}: an all-reduce over {_backend()} failed ({reason})"]
    if total != launch.world_size:
        return FAULT, [*lines, f"an all-reduce over {_backend()} counted {total} ranks, wanted {launch.world_size}"]
    return FINISHED, lines

"""Save and load a State, on any layout.

Every rank writes the boxes it owns into one file of its own; no plan is made and no tensor is sent. Rank 0 checks that
the boxes of all ranks make up every tensor, writes the manifest and only then gives the folder its name. On load every
rank reads the boxes it needs from whatever files hold them.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from htc_megatron.checkpoint.box_file import DTYPE_NAMES, FileRecord, Piece, write_boxes, write_bytes
from htc_megatron.checkpoint.boxes import Box
from htc_megatron.checkpoint.errors import CheckpointError
from htc_megatron.checkpoint.folder import begin, commit, discard
from htc_megatron.checkpoint.host import HostBuffers
from htc_megatron.checkpoint.manifest import CONFIG, Manifest, StoredTensor, check_json, config_to_bytes
from htc_megatron.checkpoint.reader import SUFFIX, CheckpointReader
from htc_megatron.checkpoint.shards import Place, State
from htc_megatron.checkpoint.together import Together
from htc_megatron.config import RunConfig

NICE = 10  # of the writing thread


@dataclass
class _Job:
    """What a rank has to write, and everything needed to finish the checkpoint without the State."""

    temporary: Path
    place: Place
    pieces: list[Piece]
    shapes: dict[str, StoredTensor]
    optimizer_step: int | None
    step: int
    config: RunConfig
    extra: dict[str, Any]
    keep: int


class PendingSave:
    """A save that goes on in a thread. A process that ends without waiting for it ends; the save then never was.

    step: the checkpoint's. stall: how long training stood still for it, in seconds. seconds: how long the thread took, once done.
    """

    def __init__(self, together: Together, job: _Job, stall: float):
        self.step, self.stall, self.seconds = job.step, stall, 0.0
        self._path: Path | None = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(together, job), name="checkpoint", daemon=True)
        self.thread.start()

    @property
    def done(self) -> bool:
        """Whether this rank's thread has ended, well or not. Other ranks may see it a little later."""
        return not self.thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """What `wait` will raise, once done."""
        return self._error

    def wait(self) -> Path:
        """Wait for the end and return the checkpoint's folder. Raises CheckpointError, on every rank, if any rank failed."""
        self.thread.join()
        if self._error is not None:
            raise self._error
        return self._path

    def _run(self, together: Together, job: _Job) -> None:
        began = time.perf_counter()
        if sys.platform == "linux":  # there a thread has a priority of its own: where cores are short, training goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            self._path = _write(together, job)
        except BaseException as error:  # raised where the result is asked for
            self._error = error
        self.seconds = time.perf_counter() - began


def save(
    root: str | Path,
    state: State,
    *,
    step: int,
    config: RunConfig,
    extra: dict[str, Any] | None = None,
    rng: dict[str, Tensor] | None = None,
    keep: int = 0,
    optimizer: bool = True,
    group: ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint into `root` and make it the latest. Collective over `group` (all ranks of the run).

    step: optimiser steps so far. extra: JSON the trainer wants back (the same on all ranks; rank 0's is kept).
    rng: this rank's random states (rng.py), given back on the same layout only. keep: how many checkpoints stay; 0: all.
    optimizer: whether the moments are stored. Returns the checkpoint's folder. Raises CheckpointError on every rank if
    any rank failed; the checkpoints that were there are then still there.
    """
    together = Together(group)
    return _write(together, _prepare(together, Path(root), state, step, config, extra, rng, keep, optimizer, buffers=None))


def save_async(
    root: str | Path,
    state: State,
    *,
    step: int,
    config: RunConfig,
    group: ProcessGroup | None,
    extra: dict[str, Any] | None = None,
    rng: dict[str, Tensor] | None = None,
    keep: int = 0,
    optimizer: bool = True,
    buffers: HostBuffers | None = None,
) -> PendingSave:
    """Like `save`, but returns as soon as everything is copied to host memory; writing goes on in a thread.

    group: a gloo group of all ranks that nothing else uses meanwhile (the thread's messages go over it); None for a
    single process. buffers: where to copy to, kept for the next save; None: fresh memory, free again when it is written.

    At most one save at a time: this one's first messages go over the same group as the last one's. wait() before the next, or
    give both the same `buffers`, which wait.
    """
    together = Together(group)
    if group is None and not together.alone:
        raise CheckpointError("save_async needs a process group of its own: its thread must not share training's")
    began = time.perf_counter()
    buffers = buffers or HostBuffers()
    buffers.reclaim()
    job = _prepare(together, Path(root), state, step, config, extra, rng, keep, optimizer, buffers)
    pending = PendingSave(together, job, time.perf_counter() - began)
    buffers.lend(pending.thread)
    return pending


def _prepare(
    together: Together,
    root: Path,
    state: State,
    step: int,
    config: RunConfig,
    extra: dict[str, Any] | None,
    rng: dict[str, Tensor] | None,
    keep: int,
    optimizer: bool,
    buffers: HostBuffers | None,
) -> _Job:
    place = state.place

    def collect() -> _Job:
        pieces: list[Piece] = []
        for shard in state.shards(optimizer):
            if not shard.stored:
                continue
            data = shard.read().detach()
            data = data if buffers is None else buffers.copy(shard.key, data)
            pieces += [Piece(shard.key, box, data[where], torch.float32) for box, where in shard.boxes()]
        shapes = {key: StoredTensor(shape, DTYPE_NAMES[torch.float32]) for key, shape in state.shapes(optimizer).items()}
        for name, value in (rng or {}).items():
            key = f"rng/{place.rank:05d}/{name}"
            pieces.append(Piece(key, Box((0,) * value.ndim, tuple(value.shape)), value.detach().clone(), value.dtype))
            shapes[key] = StoredTensor(tuple(value.shape), DTYPE_NAMES[value.dtype])
        if buffers is not None:
            buffers.synchronise()
        optimizer_step = state.optimizer_step() if optimizer else None
        return _Job(Path(), place, pieces, shapes, optimizer_step, step, config, check_json(extra or {}), keep)

    job = together.run(collect)
    job.temporary = together.on_first(lambda: begin(root, step))
    return job


def _write(together: Together, job: _Job) -> Path:
    name = f"rank_{job.place.rank:05d}{SUFFIX}"

    def finish(written: list[tuple[str, FileRecord, dict[str, int], dict[str, StoredTensor], int | None]]) -> Path:
        files = {name: record for name, record, *_ in written}
        files[CONFIG] = write_bytes(job.temporary / CONFIG, config_to_bytes(job.config))
        tensors = _merge(written)
        steps = {count for *_, count in written if count is not None}
        if len(steps) > 1:
            raise CheckpointError(f"{job.temporary}: the ranks' optimisers have made different numbers of steps: {sorted(steps)}")
        manifest = Manifest(job.step, next(iter(steps), None), job.place.layout(), tensors, files, job.extra)
        manifest.write(job.temporary)
        return commit(job.temporary, job.keep)

    def write() -> FileRecord:
        if not job.temporary.is_dir():
            seen = f"rank {job.place.rank} does not see the folder that rank 0 has made"
            raise CheckpointError(f"{job.temporary}: {seen}; output_dir must be on a file system that all nodes share")
        return write_boxes(job.temporary / name, job.pieces)

    try:
        record = together.run(write)
        counts: dict[str, int] = {}
        for piece in job.pieces:
            counts[piece.key] = counts.get(piece.key, 0) + piece.box.numel
        written = together.gather((name, record, counts, job.shapes, job.optimizer_step))
        return together.on_first(lambda: finish(written))
    except CheckpointError:
        if together.rank == 0:
            discard(job.temporary)
        raise


def _merge(written: list[tuple[str, FileRecord, dict[str, int], dict[str, StoredTensor], int | None]]) -> dict[str, StoredTensor]:
    """All ranks' tensors. Raises CheckpointError if ranks disagree about one or its boxes do not add up."""
    tensors: dict[str, StoredTensor] = {}
    stored: dict[str, int] = {}
    wrong = []
    for _, _, counts, shapes, _ in written:
        for key, tensor in shapes.items():
            if tensors.setdefault(key, tensor) != tensor:
                wrong.append(f"{key} is {tensors[key].shape} on one rank and {tensor.shape} on another")
        for key, count in counts.items():
            stored[key] = stored.get(key, 0) + count
    for key, tensor in tensors.items():
        expected = Box((), tensor.shape).numel
        if stored.get(key, 0) != expected:
            wrong.append(f"{key} of shape {tensor.shape}: the ranks hold {stored.get(key, 0)} of its {expected} entries")
    if wrong:
        raise CheckpointError(f"the ranks' shards do not make up the model: {'; '.join(wrong)}")
    return tensors


@dataclass(frozen=True)
class Loaded:
    """What `load` gives back beside the weights.

    rng: this rank's random states, if the checkpoint was written by the same layout; None: seed afresh. lacking: parts that the
    checkpoint was without, as it may.
    """

    folder: Path
    step: int
    extra: dict[str, Any]
    rng: dict[str, Tensor] | None
    layout: dict[str, Any]
    config: RunConfig
    lacking: tuple[str, ...]


def load(
    folder: str | Path,
    state: State,
    *,
    optimizer: bool = True,
    may_lack: Callable[[str], str] = lambda name: "",
    group: ProcessGroup | None = None,
) -> Loaded:
    """Fill `state` from a checkpoint (or the latest in a folder of them), whatever layout wrote it. Collective over `group`.

    optimizer: whether moments and step count are wanted too (resuming) or weights alone (starting from a model).
    may_lack: name of a weight -> the part it belongs to, if the checkpoint may be without that part (all of it or none), else "".
        Weights that it is without stay as they are.
    Raises CheckpointError on every rank, with the whole list, if a tensor is missing, misshapen or one too many, or a
    file is not what was written. Nothing is written into the state before names, shapes and files are checked.
    """
    together = Together(group)
    reader = together.run(lambda: CheckpointReader(folder))
    first = state.place.dp_rank == 0 and state.place.tp_rank == 0  # the others of the stage have the same list
    wanted: dict[str, tuple[int, ...]] = {}
    for shapes in together.share(state.shapes(optimizer) if first else {}):
        wanted.update(shapes)
    part_of = {key: may_lack(key.rpartition("/")[2]) for key in wanted}
    there = {part for key, part in part_of.items() if not part or key in reader.manifest.tensors}
    wanted = {key: shape for key, shape in wanted.items() if part_of[key] in there}
    together.run(lambda: _compare(reader, wanted, optimizer))
    together.run(lambda: state.begin_load(reader.manifest.optimizer_step if optimizer else None))
    together.run(lambda: _fill(reader, state, wanted, optimizer))
    state.finish_load()
    rng, lacking = _random_states(reader, state.place), tuple(dict.fromkeys(part for part in part_of.values() if part not in there))
    return Loaded(reader.folder, reader.step, reader.extra, rng, reader.layout, reader.config, lacking)


def _compare(reader: CheckpointReader, wanted: dict[str, tuple[int, ...]], optimizer: bool) -> None:
    kinds = ("model/", "optimizer/") if optimizer else ("model/",)
    stored = {key: tensor.shape for key, tensor in reader.manifest.tensors.items() if key.startswith(kinds)}
    if optimizer and any(key.startswith("optimizer/") for key in wanted) and reader.manifest.optimizer_step is None:
        raise CheckpointError(f"{reader.folder}: holds weights only, no optimizer state; it can start a run but not resume one")
    missing = sorted(wanted.keys() - stored.keys())
    extra = sorted(stored.keys() - wanted.keys())
    shapes = [f"{k} is {stored[k]} instead of {wanted[k]}" for k in sorted(wanted.keys() & stored.keys()) if stored[k] != wanted[k]]
    lists = (("missing", missing), ("not part of this model", extra), ("of another shape", shapes))
    wrong = [f"{len(names)} {what}: {', '.join(names)}" for what, names in lists if names]
    if wrong:
        raise CheckpointError(f"{reader.folder} does not fit this model; tensors {'; '.join(wrong)}")


def _fill(reader: CheckpointReader, state: State, wanted: Container[str], optimizer: bool) -> None:
    for shard in state.shards(optimizer):
        if shard.key not in wanted:
            continue
        value = torch.zeros(shard.numel)  # padding rows, which no checkpoint holds, become zero
        for box, piece in shard.boxes():
            reader.read_box(shard.key, box, out=value[piece].view(box.size))
        shard.write(value)


def _random_states(reader: CheckpointReader, place: Place) -> dict[str, Tensor] | None:
    prefix = f"rng/{place.rank:05d}/"
    if {k: reader.layout.get(k) for k in ("world_size", "tp_size", "pp_size", "dp_size")} != {
        k: place.layout()[k] for k in ("world_size", "tp_size", "pp_size", "dp_size")
    }:
        return None
    return {key.removeprefix(prefix): reader.read(key) for key in reader.manifest.tensors if key.startswith(prefix)} or None

"""Micro-batches of one data-parallel rank, step by step, built ahead of the trainer in threads."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from htc_megatron.config import ConfigError, RunConfig
from htc_megatron.data.collate import Collator
from htc_megatron.data.dataset import PreparedData
from htc_megatron.data.feature_cache import FeatureCache
from htc_megatron.data.packing import check_lengths, pack
from htc_megatron.data.sampler import GlobalBatchSampler, rank_rows
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.model.layout import MicroBatch
from htc_megatron.model.mgvq import load_mgvq, mgvq_fingerprint

PREFETCH_STEPS = 2  # steps built ahead of the one in use

Rows = list[list[int]]  # packed rows of sample indices
Step = tuple[Any, list[Rows]]  # what to hand out along with a step, and its micro-batches


def open_data(config: RunConfig, path: str | Path) -> PreparedData:
    """The data set at path, checked against the run: vocabulary, codes and, where the run names them, tokenizer and MGVQ.

    Raises ConfigError with the first thing that does not fit.
    """
    data = PreparedData(path)
    tokenizer = load_tokenizer(config.tokenizer).fingerprint if config.tokenizer else ""
    mgvq = ""
    if config.model.has_mgvq and config.mgvq_checkpoint:
        mgvq = mgvq_fingerprint(load_mgvq(config.mgvq_checkpoint, config.model.mgvq, encoder_only=True))
    data.check(config.model, tokenizer, mgvq)
    return data


class DataLoader:
    """Endless steps of training: an iterator whose items are a data-parallel rank's list of MicroBatch.

    The lists of all ranks, put side by side, are the same whatever dp_size is; every tensor- and pipeline-parallel rank of one
    data-parallel rank gets the same samples. Deterministic in (data, data.seed, consumed_batches).

    Args:
        config: training.{seq_length, micro_batch_size, global_batch_size}, data.{seed, num_workers} and model are read.
        path: folder written by tools/prepare_data.py.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        needs_pixels: build pixel_values and codes; False where the front-end does not live. A micro-batch without an image
            then carries one blank image.
        consumed_batches: global batches taken before, over all epochs: where to resume.
        shuffle: False keeps the data's own order in every epoch.
        cache: of a frozen tower's features; images that it has are not decoded.

    Attributes:
        consumed_batches: global batches handed out so far; the whole state. epoch: of the last one.
        wait_seconds: time spent in waiting since the end of the first step, whose own data nothing can be done beside.
        wait_share: the same over the time since then.
        rows, padding_share: of the current epoch: packed rows, and the share of their places that holds no token.

    Raises ConfigError where data and configuration do not fit.
    """

    def __init__(
        self,
        config: RunConfig,
        path: str | Path,
        dp_rank: int,
        dp_size: int,
        needs_pixels: bool,
        consumed_batches: int = 0,
        shuffle: bool = True,
        cache: FeatureCache | None = None,
    ):
        training = config.training
        self.data = open_data(config, path)
        lengths = self.data.lengths(config.model)
        self.sampler = GlobalBatchSampler(
            lengths, training.seq_length, training.global_batch_size, config.data.seed, shuffle, f"data {path}", consumed_batches
        )
        self.micro_batch_size, self.dp_rank, self.dp_size = training.micro_batch_size, dp_rank, dp_size
        _check_batch(config, dp_size)
        self.consumed_batches = consumed_batches
        self.epoch, self.rows, self.padding_share = self._epoch()
        collator = Collator(self.data, config.model, training.seq_length, needs_pixels, cache)
        self._prefetch = Prefetcher(self._steps(), collator, _workers(config, needs_pixels))

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        (self.epoch, self.rows, self.padding_share), batches = next(self._prefetch)
        self.consumed_batches += 1
        return batches

    def ready(self, seconds: float) -> bool:
        """Whether the next step can be had at once; waits for it up to `seconds`. What could not be built is ready too: to be raised."""
        return self._prefetch.ready(seconds)

    @property
    def wait_seconds(self) -> float:
        return self._prefetch.wait_seconds

    @property
    def wait_share(self) -> float:
        return self._prefetch.wait_share

    def close(self) -> None:
        """End the threads; what they still build is dropped. Iterating afterwards raises RuntimeError."""
        self._prefetch.close()

    def _steps(self) -> Iterator[Step]:
        while True:
            _, batch = self.sampler.next_batch()
            yield self._epoch(), rank_rows(batch, self.micro_batch_size, self.dp_rank, self.dp_size)

    def _epoch(self) -> tuple[int, int, float]:
        """Of the epoch that the sampler is in: its number, rows and share of padding."""
        packing = self.sampler.packing
        return self.sampler.epoch, len(packing.rows), packing.padding_share


class ValidationLoader:
    """Passes over a data set in its own order; each iteration starts at its beginning and takes the same steps.

    A pass has at most max_batches global batches (0: all). The last one is filled up with rows of padding, so that every rank
    takes as many steps and no sample is left out. Other arguments as of DataLoader.
    """

    def __init__(
        self,
        config: RunConfig,
        path: str | Path,
        dp_rank: int,
        dp_size: int,
        needs_pixels: bool,
        max_batches: int = 0,
        cache: FeatureCache | None = None,
    ):
        training = config.training
        self.data = open_data(config, path)
        lengths = self.data.lengths(config.model)
        check_lengths(lengths, training.seq_length, f"data {path}")
        _check_batch(config, dp_size)
        rows, size = pack(lengths, training.seq_length, 0, 0, shuffle=False).rows, training.global_batch_size
        rows += [[] for _ in range(-len(rows) % size)]
        batches = [rows[i : i + size] for i in range(0, len(rows), size)][: max_batches or None]
        self._steps = [rank_rows(batch, training.micro_batch_size, dp_rank, dp_size) for batch in batches]
        self._collator = Collator(self.data, config.model, training.seq_length, needs_pixels, cache)
        self._workers = _workers(config, needs_pixels)

    def __len__(self) -> int:
        """Steps of a pass."""
        return len(self._steps)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        prefetch = Prefetcher(((None, step) for step in self._steps), self._collator, self._workers)
        try:
            for _, batches in prefetch:
                yield batches
        finally:
            prefetch.close()


class Prefetcher:
    """Builds the steps of an iterator of (state, micro-batches as rows) in threads, a few steps ahead, handing them out in order.

    workers 0: nothing runs ahead, a step is built when it is asked for. An error while building is raised where its step is due.
    """

    def __init__(self, steps: Iterator[Step], collator: Callable[[Rows], MicroBatch], workers: int):
        self._steps, self._collator = steps, collator
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="data") if workers else None
        self._ahead: deque[tuple[Any, list[Future[MicroBatch]]]] = deque()
        self._closed = False
        self._asked = 0  # how often a step was asked for
        self._begun = 0.0  # when the second one was: the first step is over then
        self.wait_seconds = 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time since the end of the first step that was spent in waiting; 0 before."""
        return self.wait_seconds / (time.perf_counter() - self._begun) if self._asked > 1 else 0.0

    def __iter__(self) -> Iterator[tuple[Any, list[MicroBatch]]]:
        return self

    def __next__(self) -> tuple[Any, list[MicroBatch]]:
        if self._closed:
            raise RuntimeError("the data loader is closed")
        begin = time.perf_counter()
        self._asked += 1
        if self._asked == 2:
            self._begun = self._begun or begin
        try:
            if self._pool is None:
                state, micro_batches = next(self._steps)
                return state, [self._collator(rows) for rows in micro_batches]
            self._fill()
            if not self._ahead:
                raise StopIteration
            state, futures = self._ahead.popleft()
            try:
                batches = [future.result() for future in futures]
            except Exception:
                self.close()  # going on would silently leave this step out
                raise
            self._fill()
            return state, batches
        finally:
            if self._asked > 1:
                self.wait_seconds += time.perf_counter() - begin

    def ready(self, seconds: float) -> bool:
        """Whether the next step is built, or would be built by asking for it (workers 0); waits up to `seconds`."""
        if self._pool is None or self._closed:
            return True
        begin = time.perf_counter()
        self._fill()
        if not self._ahead:
            return True
        _, futures = self._ahead[0]
        done, not_done = wait(futures, seconds, FIRST_EXCEPTION)
        if self._asked:
            self._begun = self._begun or begin
            self.wait_seconds += time.perf_counter() - begin
        return not not_done or any(future.exception() for future in done)

    def close(self) -> None:
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def _fill(self) -> None:
        while len(self._ahead) < PREFETCH_STEPS:
            step = next(self._steps, None)
            if step is None:
                return
            state, micro_batches = step
            self._ahead.append((state, [self._pool.submit(self._collator, rows) for rows in micro_batches]))


def _workers(config: RunConfig, needs_pixels: bool) -> int:
    """Threads: ranks without pixels have little to build, but need not wait for it either."""
    return config.data.num_workers if needs_pixels else min(1, config.data.num_workers)


def _check_batch(config: RunConfig, dp_size: int) -> None:
    training = config.training
    if training.global_batch_size % (training.micro_batch_size * dp_size):
        raise ConfigError(
            f"training.global_batch_size is {training.global_batch_size}, wanted a multiple of "
            f"micro_batch_size {training.micro_batch_size} x {dp_size} data-parallel ranks"
        )

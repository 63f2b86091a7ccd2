"""A frozen tower's features between steps: which are taken from the cache, agreed among ranks, and which are put there."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from htc_megatron.config import RunConfig
from htc_megatron.data.collate import read_pixels
from htc_megatron.data.feature_cache import FeatureCache, tower_key
from htc_megatron.model.layout import MicroBatch
from htc_megatron.model.naming import Entry
from htc_megatron.parallel.groups import Groups
from htc_megatron.parallel.zero import ZeroEngine, sum_over
from htc_megatron.training.build import entries_of_stage
from htc_megatron.weights.table import component, partition

WRITING = 4  # steps whose features wait to be written; more would only hold memory


def tower_fingerprint(engine: ZeroEngine, config: RunConfig, groups: Groups) -> str:
    """SHA-256 of the tower's weights as they compute, the same on every layout. Called by every rank of the first stage."""
    digest = hashlib.sha256()
    for entry in entries_of_stage(engine.module, config, groups):
        if component(entry.name) == "vision":
            with engine.whole([entry.param]):
                weight = _over_tp(entry, groups).cpu()
            digest.update(f"{entry.name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _over_tp(entry: Entry, groups: Groups) -> Tensor:
    """A weight in its stored form, from all tensor-parallel ranks' shares."""
    mine = entry.param.detach().contiguous()
    shares = [torch.empty_like(mine) for _ in range(groups.tp_size)]
    dist.all_gather(shares, mine, group=groups.tp)
    whole = mine.new_empty(entry.weight.shape)
    for rank, share in enumerate(shares):
        part = partition(entry.weight, rank, groups.tp_size)
        place = tuple(slice(start, start + size) for start, size in zip(part.offset, part.size, strict=True))
        whole[place] = share.view(part.view_shape)[tuple(slice(size) for size in part.size)]
    return whole


class TowerFeatures:
    """Keeps the features of one run's frozen tower in data.feature_cache. Made on the ranks of the first pipeline stage.

    Every rank looks its images up by itself and ahead of time, so two ranks may find different ones. Before the forward pass they
    agree: tensor-parallel ranks on each image, as they share its computation; under ZeRO-3 data-parallel ranks on whether the tower
    runs on their micro-batches of one number, as its weights are gathered from all of them. An image that comes again within the
    few steps that the loader builds ahead is computed again.

    Attributes: spared, computed: images so far, on this data-parallel rank, that the tower did not and did run on. An image that a
    micro-batch has twice is one of each at most. failure: why nothing is written any more.
    """

    def __init__(self, engine: ZeroEngine, config: RunConfig, groups: Groups):
        self.config, self.groups, self.gathers = config, groups, engine.stage == 3 and groups.dp_size > 1
        dtype = engine.module.config.params_dtype
        tower = tower_key(tower_fingerprint(engine, config, groups), config.model.vision, dtype)
        self.cache = FeatureCache(config.data.feature_cache, tower, config.model.vision, dtype)
        self.spared = self.computed = 0
        self.failure: str | None = None
        self._thread = ThreadPoolExecutor(1, "features")
        self._writing: deque[Future[None]] = deque()

    def agree(self, batches: list[MicroBatch]) -> None:
        """Settle for a step's micro-batches, in place, what is taken as found and where the tower runs. Called before the forward."""
        if self.groups.tp_size > 1:
            self._agree_on_images(batches)
        runs = [bool(batch.features.missing) for batch in batches]
        if self.gathers:
            anywhere = torch.tensor(runs, dtype=torch.int32, device=self.groups.device)
            dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=self.groups.dp)
            runs = anywhere.bool().tolist()
        for batch, run in zip(batches, runs, strict=True):
            batch.features.run_tower = run

    def _agree_on_images(self, batches: list[MicroBatch]) -> None:
        """Leave as found what all tensor-parallel ranks have found, and read the pixels of the rest."""
        everywhere = torch.cat([batch.features.found for batch in batches]).to(self.groups.device, torch.int32)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=self.groups.tp)
        sizes = [len(batch.features.found) for batch in batches]
        for batch, found in zip(batches, everywhere.bool().cpu().split(sizes), strict=True):
            features = batch.features
            if not torch.equal(found, features.found):
                features.known = features.known[found[features.found]]
                features.found = found
                batch.pixel_values = read_pixels(features.missing, self.config.model)

    def keep(self, batches: list[MicroBatch]) -> None:
        """Have what a step's forward computed written to the cache, by a thread, and count. Called after the step."""
        slots = []
        for batch in batches:
            missing = batch.features.missing
            self.computed += len(missing)
            self.spared += batch.layout.num_images - len(missing)
            if missing:
                slots += zip(missing, batch.features.computed.to("cpu"), strict=True)
                batch.features.computed = None
        if slots and self.groups.tp_rank == 0 and self.failure is None:
            while len(self._writing) >= WRITING:
                self._writing.popleft().result()
            self._writing.append(self._thread.submit(self._write, slots))

    def _write(self, slots: list) -> None:
        try:
            for (shard, image), features in slots:
                self.cache.write(shard, image, features)
        except OSError as error:  # nothing is lost but time: what is not there will be computed
            self.failure = f"writing to {self.cache.folder} ended with: {error.strerror}"

    def around(self, steps: Iterable[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
        """The same steps, agreed before each and kept after it."""
        for batches in steps:
            self.agree(batches)
            yield batches
            self.keep(batches)

    def totals(self) -> list[int]:
        """Images spared and computed on all data-parallel ranks, and how many of these could not write. Called by every rank of the
        first stage."""
        while self._writing:
            self._writing.popleft().result()
        counts = [self.spared, self.computed, int(self.failure is not None)]
        return sum_over(torch.tensor(counts, dtype=torch.int64, device=self.groups.device), self.groups.dp).tolist()

    def close(self) -> None:
        """Wait for what is being written."""
        self._thread.shutdown(wait=True)
        self.cache.close()

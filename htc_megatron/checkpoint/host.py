"""Host memory that saves in a thread write from."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread

import torch
from torch import Tensor

CHUNK = 1 << 22  # entries that one thread copies at a time
COPIERS = 4  # threads at most; on two cores two copied a fifth faster than one


class HostBuffers:
    """The copy of one rank's shards, in memory that is kept from one save to the next.

    Fresh memory costs several times the copy itself, since the system has to find and clear every page of it. It is as much
    as the rank's own file. Copies of tensors on a GPU are page-locked, so the GPU writes them itself; torch rounds each of
    those up to a power of two.
    """

    def __init__(self):
        self.kept: dict[str, Tensor] = {}
        self.reader: Thread | None = None
        # Training stands still while they copy, so its core and the one that will write are both free.
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.copiers = ThreadPoolExecutor(max(1, min(cores, COPIERS)), "checkpoint copy")
        self.copies: list[Future[Tensor]] = []

    def lend(self, reader: Thread) -> None:
        """From now on `reader` reads what was copied, as long as it lives."""
        self.reader = reader

    def reclaim(self) -> None:
        """Wait until nobody reads the copies any more."""
        if self.reader is not None:
            self.reader.join()
            self.reader = None

    def copy(self, key: str, data: Tensor) -> Tensor:
        """A copy of `data` in host memory, complete after `synchronise`. The one made before under this key is overwritten."""
        kept = self.kept.get(key)
        if kept is None or kept.shape != data.shape or kept.dtype != data.dtype:
            kept = self.kept[key] = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
        if data.is_cuda:
            return kept.copy_(data, non_blocking=True)
        for target, source in zip(kept.view(-1).split(CHUNK), data.reshape(-1).split(CHUNK), strict=True):
            self.copies.append(self.copiers.submit(target.copy_, source))
        return kept

    def synchronise(self) -> None:
        """Wait until all copies are made. Raises what went wrong with one."""
        copies, self.copies = self.copies, []
        for copy in copies:
            copy.result()
        if any(kept.is_pinned() for kept in self.kept.values()):
            torch.cuda.current_stream().synchronize()

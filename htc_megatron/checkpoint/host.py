"""Host memory that saves in a thread write from."""

from threading import Thread

import torch
from torch import Tensor


class HostBuffers:
    """The copy of one rank's shards, in memory that is kept from one save to the next.

    Fresh memory costs several times the copy itself, since the system has to find and clear every page of it. It is as much
    as the rank's own file. Copies of tensors on a GPU are page-locked, so the GPU writes them itself; torch rounds each of
    those up to a power of two.
    """

    def __init__(self):
        self.kept: dict[str, Tensor] = {}
        self.reader: Thread | None = None

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
        return kept.copy_(data, non_blocking=True)

    def synchronise(self) -> None:
        """Wait for the GPU to have written all copies."""
        if any(kept.is_pinned() for kept in self.kept.values()):
            torch.cuda.current_stream().synchronize()

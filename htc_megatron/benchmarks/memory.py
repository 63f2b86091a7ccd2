"""How much memory a process holds, by its allocator's own books: resident memory would count what it keeps for reuse."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _MallocInfo(ctypes.Structure):
    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def allocated() -> float:
    """MiB allocated and not freed: on the GPU by torch where there is one, else by glibc (mallinfo2, glibc >= 2.33)."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo2.restype = _MallocInfo
    info = mallinfo2()
    return (info.uordblks + info.hblkhd) / 2**20


class Peak:
    """mib: the most that was allocated so far."""

    def __init__(self):
        self.mib = allocated()


@contextmanager
def peak_allocated(every_s: float = 0.001) -> Iterator[Peak]:
    """The most memory allocated within it: exact on a GPU, on CPU the most of what a thread sees every `every_s` seconds."""
    found = Peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield found
        found.mib = torch.cuda.max_memory_allocated() / 2**20
        return
    done = threading.Event()

    def sample() -> None:
        while not done.wait(every_s):
            found.mib = max(found.mib, allocated())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield found
    finally:
        done.set()
        sampler.join()
        found.mib = max(found.mib, allocated())

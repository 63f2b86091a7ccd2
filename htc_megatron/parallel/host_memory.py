"""Freed host memory stays with the process: on CPU a step's large tensors are then made of pages that are there already.

glibc gives each freed block of more than 32 MiB back to the kernel, and the next one is faulted in anew, page by page. On the machine
of the README's figures that made the copy of a tensor of 131 MiB take 200 ms instead of 8, and a training step of 10.1 s one of 12.
"""

import ctypes
import os
import platform

# mallopt's parameters, from glibc's malloc.h; as variables of the environment: MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SETTINGS = {M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_THRESHOLD: 2**30}  # bytes
SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Blocks of up to 1 GiB come from the heap, and up to 2 GiB that are free at its end are kept. Returns whether it was done.

    Not done with another C library, nor where the environment has settings, or an allocator, of its own. A process goes on holding
    about what it once needed at most, and some more, as freed pieces do not always fit what is asked for next.
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in SET_BY_USER):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) == 1 for parameter, value in SETTINGS.items())

"""Large blocks, freed and asked for again, are not faulted in anew."""

import os
import platform
import subprocess
import sys

import pytest

from htc_megatron.parallel.host_memory import SET_BY_USER

FAULTS = """
import resource, torch
from htc_megatron.parallel.host_memory import keep_freed_memory
print({call})
block = torch.zeros(48 * 2**20, dtype=torch.uint8)
for _ in range(12):
    block.clone()  # alignment leaves pieces, until one fits
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    block.clone()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def said_and_faults(call: str, **settings: str) -> tuple[str, int]:
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_USER} | settings
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(call=call)], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    said, faults = done.stdout.split()
    return said, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc keeps memory in its own way")
def test_freed_memory_is_used_again():
    said, kept = said_and_faults("keep_freed_memory()")
    _, given_back = said_and_faults("None")
    assert said == "True" and kept < 40
    assert given_back >= 80  # four blocks of 24 pages, should they be as large as 2 MiB


def test_the_environments_own_settings_stay():
    assert said_and_faults("keep_freed_memory()", MALLOC_MMAP_THRESHOLD_="1048576")[0] == "False"

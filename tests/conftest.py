"""Fixtures of the whole suite. `ranks(n).run(function, ...)` runs a function on n processes: see tests/distributed.py."""

import os
from collections.abc import Callable, Iterator

from tests.distributed import ENVIRONMENT, Pool, Ranks

os.environ.update(ENVIRONMENT)  # before any test file imports torch

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("repository", deadline=None)  # a busy machine is slow without being wrong
settings.load_profile("repository")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """A function of the number of ranks. The processes start with the first job and serve the whole session."""
    pool = Pool()
    yield lambda world_size: Ranks(pool, world_size)
    pool.close()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups for pytest-xdist's loadgroup: tests on several processes fill the cores alone, so one worker takes all of them in turn
    and the other the rest, file by file. The SLURM job waits for SLURM's clocks most of its time and goes with the rest."""
    for item in items:
        together = "ranks" in getattr(item, "fixturenames", ()) and item.path.stem != "test_slurm"
        item.add_marker(pytest.mark.xdist_group("several processes" if together else item.path.stem))

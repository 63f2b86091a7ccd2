"""Fixtures of the whole suite. `ranks(n).run(function, ...)` runs a function on n processes: see tests/distributed.py."""

import os
from collections.abc import Callable, Iterator

from tests.distributed import ENVIRONMENT, Pool, Ranks

os.environ.update(ENVIRONMENT)  # before any test file imports torch

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("repository", deadline=None)  # a busy machine is slow without being wrong
settings.load_profile("repository")


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on the harness's ranks, which fill the machine: tests/run.sh runs the others side by side."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("distributed")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """A function of the number of ranks. The processes start with the first job and serve the whole session."""
    pool = Pool()
    yield lambda world_size: Ranks(pool, world_size)
    pool.close()

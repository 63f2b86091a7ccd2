"""Which parameters of a test are in a run of all tests: the suite has to stay under 25 minutes on two cores."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], often: Collection[Any]) -> list[Any]:
    """All of `values` for parametrize, those that are not among `often` marked slow. Raises ValueError if one of `often` is no value."""
    values = list(values)
    if unknown := [value for value in often if value not in values]:
        raise ValueError(f"{unknown[0]!r} is to run often but is no parameter of the test")
    return [value if value in often else pytest.param(*_arguments(value), marks=pytest.mark.slow) for value in values]


def _arguments(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)

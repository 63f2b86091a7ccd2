"""Files of benchmarks and of answers: read with their types checked, and refused in one sentence that names the record."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.task import Item

Kind = TypeVar("Kind")
SHOWN = 60  # characters of a faulty value that a sentence repeats


def read_bytes(path: Path) -> bytes:
    """Raises ConfigError where there is no such file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """A JSON file as `kind`; keys that it does not name are left out. Raises ConfigError."""
    return parse(read_bytes(path), kind, str(path))


def read_lines(path: Path, kind: type[Kind]) -> list[Kind]:
    """A file of one JSON value a line; empty lines do not count. Raises ConfigError."""
    lines = enumerate(read_bytes(path).split(b"\n"), 1)
    return [parse(line, kind, f"{path}: line {number}") for number, line in lines if line.strip()]


def parse(data: bytes, kind: type[Kind], where: str) -> Kind:
    """A JSON value as `kind`. `where` opens the sentence of ConfigError."""
    try:
        return _adapter(kind).validate_json(data, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = "".join(f"{part}: " for part in fault["loc"])
        seen = repr(fault["input"])
        seen = seen if len(seen) <= SHOWN else f"{seen[:SHOWN]}..."
        raise ConfigError(f"{where}: {place}{fault['msg'][0].lower()}{fault['msg'][1:]}, got {seen}") from None


_adapter = cache(TypeAdapter)


def existing(root: Path, *names: str) -> Path:
    """The first of root/name that exists. Raises ConfigError where none does."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise ConfigError(f"{root / names[0]} does not exist" + "".join(f", nor does {root / name}" for name in names[1:]))


def paired(name: str, items: Sequence[Item], answers: Mapping[str, str]) -> Iterator[tuple[Item, str]]:
    """Each item of task `name` and its answer. Raises ConfigError where an answer is missing, or belongs to no item."""
    keys = {item.key for item in items}
    missing, unknown = keys - answers.keys(), answers.keys() - keys
    if missing:
        raise ConfigError(f"{name}: {len(missing)} of {len(keys)} questions have no answer, {min(missing)!r} among them")
    if unknown:
        raise ConfigError(f"{name}: {len(unknown)} answers belong to none of {len(keys)} questions, {min(unknown)!r} among them")
    return ((item, answers[item.key]) for item in items)

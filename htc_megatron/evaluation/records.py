"""Files of benchmarks and of answers: read with their types checked, and refused in one sentence that names the record."""

from collections.abc import Iterator, Mapping, Sequence
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
    return _checked(TypeAdapter(kind), read_bytes(path), str(path))


def read_lines(path: Path, kind: type[Kind]) -> list[Kind]:
    """A file of one JSON value a line; empty lines do not count. Raises ConfigError."""
    return parse_lines(path, read_bytes(path).split(b"\n"), kind)


def parse_lines(path: Path, lines: Sequence[bytes], kind: type[Kind], first: int = 1) -> list[Kind]:
    """Lines of `path`, of which the first is number `first`."""
    adapter = TypeAdapter(kind)
    return [_checked(adapter, line, f"{path}: line {number}") for number, line in enumerate(lines, first) if line.strip()]


def _checked(adapter: TypeAdapter, data: bytes, where: str):
    try:
        return adapter.validate_json(data, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = "".join(f"{part}: " for part in fault["loc"])
        seen = repr(fault["input"])
        seen = seen if len(seen) <= SHOWN else f"{seen[:SHOWN]}..."
        raise ConfigError(f"{where}: {place}{fault['msg'][0].lower()}{fault['msg'][1:]}, got {seen}") from None


def existing(root: Path, *names: str) -> Path:
    """The first of root/name that exists. Raises ConfigError where none does."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise ConfigError(f"{root / names[0]} does not exist" + "".join(f", nor does {root / name}" for name in names[1:]))


def paired(name: str, items: Sequence[Item], answers: Mapping[str, str]) -> Iterator[tuple[Item, str]]:
    """Each item of task `name` and its answer. Raises ConfigError where an answer is missing, or belongs to no item."""
    keys = {item.key for item in items}
    for wrong, sentence in ((keys - answers.keys(), "has no answer to"), (answers.keys() - keys, "has no question")):
        if wrong:
            raise ConfigError(f"{name} {sentence} {min(wrong)!r}, nor {len(wrong) - 1} more; wanted an answer to each of {len(keys)} questions")
    return ((item, answers[item.key]) for item in items)

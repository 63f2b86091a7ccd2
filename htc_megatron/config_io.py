"""Configurations from YAML and the command line, and back.

    base: align.yaml            # optional: the file this one builds on, relative to itself
    optimizer: {lr: 1e-4}

`load_config(["run.yaml", "overlay.yaml"], ["training.seq_length=512"])` reads these, each laid over the one before, puts the
overrides on top and validates the types strictly. Every fault is a ConfigError: one sentence with the full key, the value seen
and the value wanted.
"""

import dataclasses
import difflib
import json
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from htc_megatron.config import ConfigError, RunConfig
from htc_megatron.config_checks import check
from htc_megatron.zero_json import load_zero

__all__ = ["check", "files_and_overrides", "from_dict", "load_config", "load_zero", "read_yaml", "to_dict", "to_yaml"]

Config = TypeVar("Config")
_YAML_FILE = re.compile(r"(?![\w.]+=).*\.ya?ml")  # no key=value, whose value may end so too
BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}  # pydantic's names of constraints


def load_config(paths: str | Path | Sequence[str | Path] | None, overrides: Iterable[str] = (), kind: type[Config] = RunConfig) -> Config:
    """The configuration in a YAML file, with `a.b.c=value` overrides (values are YAML too) on top.

    paths: the file; or several, each laid over those before it; none: the defaults. kind: the dataclass that is wanted. Types are
    validated; what fits together is `check`'s to say. Raises ConfigError.
    """
    files = [paths] if isinstance(paths, str | Path) else paths or []
    tree: dict = {}
    for path in files:
        tree = _merged(tree, _read_with_base(Path(path), ()))
    for override in overrides:
        _override(tree, override)
    return from_dict(tree, kind, ", ".join(map(str, files)))


def files_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts a command line: the first argument and whatever else ends as a YAML file's name are files, the others overrides."""
    files = [word for i, word in enumerate(arguments) if i == 0 or _YAML_FILE.fullmatch(word)]
    return files, [word for i, word in enumerate(arguments) if i and not _YAML_FILE.fullmatch(word)]


def from_dict(tree: dict, kind: type[Config] = RunConfig, source: str = "") -> Config:
    """The configuration in nested dictionaries. `source` (a file's name) opens the sentences of ConfigError."""
    faults = [*_unknown_keys(tree, kind)]
    if not faults:
        tree = _prepare(tree, kind)
        try:
            return TypeAdapter(kind).validate_json(json.dumps(tree, default=str), strict=True)
        except ValidationError as error:
            of_keys: dict[str, str] = {}  # a value that fits neither member of a union is a fault of both: the first one tells
            for fault in error.errors(include_url=False):
                text = _sentence(fault, kind)
                of_keys.setdefault(text.partition(": ")[0], text)
            faults = [*of_keys.values()]
    raise ConfigError("\n".join(f"{source}: {fault}" if source else fault for fault in dict.fromkeys(faults)))


def to_dict(config: Any) -> dict:
    """Nested dictionaries of plain values, tuples as lists: what `from_dict` takes back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML, every field written out: what `load_config` reads back as an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120)


def read_yaml(path: str | Path) -> dict:
    """A YAML file's mapping. A missing or broken file, a key that stands twice and anything but a mapping raise ConfigError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); wanted a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text; wanted a YAML file") from error
    tree = _parse(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {_shown(tree)}, wanted keys and values such as 'training: {{seq_length: 512}}'")
    return tree


def _read_with_base(path: Path, above: tuple[Path, ...]) -> dict:
    """The file's mapping laid over its base's."""
    place = path.resolve()
    if place in above:
        raise ConfigError(f"{path}: base leads back to the file itself: {' -> '.join(p.name for p in (*above, place))}")
    tree = read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: got {_shown(base)}, wanted the path of a YAML file")
    try:
        return _merged(_read_with_base(path.parent / base, (*above, place)), tree)
    except ConfigError as error:
        raise ConfigError(f"{error} (base of {path})") from error


def _merged(under: dict, over: dict) -> dict:
    merged = dict(under)
    for key, value in over.items():
        if isinstance(merged.get(key), dict) and (value is None or isinstance(value, dict)):  # an empty section changes nothing
            merged[key] = _merged(merged[key], value or {})
        else:
            merged[key] = value
    return merged


def _override(tree: dict, text: str) -> None:
    """Lay one `a.b.c=value` over the tree, in place."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"command line: got {text!r}, wanted key=value such as training.seq_length=512")
    section = tree
    for part in parts[:-1]:
        if not isinstance(section.get(part), dict):
            section[part] = {}
        section = section[part]
    section[parts[-1]] = _parse(value, f"command line, {key}") if value.strip() else ""


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key standing twice: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [(self.construct_object(k, deep=True), k.start_mark.line + 1) for k, _ in node.value if k.tag != "tag:yaml.org,2002:merge"]
        seen: dict[Any, int] = {}
        for key, line in keys:
            if not isinstance(key, str):
                raise ConfigError(f"line {line}: key {key!r} is not text")
            if key in seen:
                raise ConfigError(f"line {line}: key {key!r} stands twice, first on line {seen[key]}")
            seen[key] = line
        return super().construct_mapping(node, deep)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{source}: {where}not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _is_section(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def _keys(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and type of every key that holds a value, in order."""
    for name, hint in _hints(kind).items():
        if _is_section(hint):
            yield from _keys(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _unknown_keys(tree: Any, kind: type, prefix: str = "", root: type | None = None) -> Iterator[str]:
    root = root or kind
    hints = _hints(kind)
    for name, value in tree.items():
        full = prefix + str(name)
        if name not in hints:
            yield f"{full}: unknown key; {_nearest(full, kind, prefix, root)}"
        elif _is_section(hints[name]) and isinstance(value, dict):
            yield from _unknown_keys(value, hints[name], f"{full}.", root)


def _nearest(full: str, kind: type, prefix: str, root: type) -> str:
    """Which known key was probably meant: a name like it here, or else in another section."""
    name, everywhere = full.rpartition(".")[2], {key.rpartition(".")[2]: key for key, _ in reversed([*_keys(root)])}
    near = [prefix + match for match in difflib.get_close_matches(name, list(_hints(kind)), 1, 0.75)]
    near = near or [everywhere[match] for match in difflib.get_close_matches(name, list(everywhere), 1, 0.8)]
    if near:
        return f"did you mean {near[0]}?"
    return f"known {'here' if prefix else 'at the top'} are {', '.join(_hints(kind))}"


def _prepare(value: Any, hint: Any) -> Any:
    """Smooth what YAML does to honest values: an empty section is {}, and 1e-4 (text to YAML 1.1) is a number."""
    if _is_section(hint):
        if value is None:
            return {}
        if isinstance(value, dict):
            hints = _hints(hint)
            return {name: _prepare(item, hints[name]) for name, item in value.items()}
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _sentence(fault: Any, kind: type) -> str:
    """One of pydantic's faults in our words."""
    hint: Any = kind
    parts = []
    for part in fault["loc"]:
        if _is_section(hint):
            if part not in _hints(hint):
                break
            hint = _hints(hint)[part]
        elif isinstance(part, int) and get_origin(hint) is tuple:
            hint = get_args(hint)[0]
        else:
            break
        parts.append(str(part))
    key, seen = ".".join(parts), fault["input"]
    if key == "training.precision" and str(seen).lower() in ("fp16", "float16", "half", "16"):
        return (
            f"{key}: got {seen!r}, wanted bf16 or fp32: DeepSpeed's fp16 raises on pipeline stages that do not hold the loss, "
            "so fp16 is refused on every layout"
        )
    if fault["type"] == "value_error":  # raised by the dataclass itself
        return f"{key}: {fault['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    if fault["type"] == "missing":
        return f"{key}: missing, wanted {_wanted(hint)}"
    bounds = [f"{words} {value}" for name, words in BOUNDS.items() if (value := fault.get("ctx", {}).get(name)) is not None]
    return f"{key}: got {_shown(seen)}, wanted {bounds[0] if bounds else _wanted(hint)}"


def _wanted(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if hint in names:
        return names[hint]
    origin = get_origin(hint)
    if origin is Literal:
        values = [str(value) for value in get_args(hint)]
        return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} or {values[-1]}"
    if origin is tuple:
        return f"a list, each entry {_wanted(get_args(hint)[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_wanted, get_args(hint)))
    if get_args(hint):  # Annotated[type, constraint]
        return _wanted(get_args(hint)[0])
    if _is_section(hint):
        return f"keys and values ({', '.join(_hints(hint))})"
    return str(hint)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, dict | list | tuple | bool | None) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

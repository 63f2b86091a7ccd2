"""Imports run one way: config <- parallel <- model <- data, checkpoint, weights <- training, inference, evaluation."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "htc_megatron"
FLOORS = [
    {"__init__", "config", "config_checks", "config_io", "zero_json", "weights.table", "hf"},
    {"parallel"},
    {"model"},
    {"data", "checkpoint", "weights", "cluster"},
    {"training", "inference", "evaluation", "benchmarks", "planner"},
]
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """`model.layout` for htc_megatron/model/layout.py, `model` for its __init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def floor_of(module: str) -> int:
    room = module.split(".")[0]
    return next(i for i, rooms in enumerate(FLOORS) if module in rooms or (room in rooms and module not in FLOORS[0]))


def imported(path: Path) -> set[str]:
    """Our modules that a file names in its imports, wherever they stand in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {module_of(file) for file in FILES}
    return {name.removeprefix("htc_megatron.") for name in names if name.startswith("htc_megatron.")} & modules


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_imports_from_above(path):
    module = module_of(path)
    for other in imported(path):
        package = module == other.split(".")[0] or other == module.split(".")[0]  # a room's own __init__ gathers its files
        assert package or floor_of(other) <= floor_of(module), f"{module} imports {other}, which stands above it"
        if module.startswith("hf") and not other.startswith("hf"):
            pytest.fail(f"{module} travels with exports, so it may not import {other}")


def test_rooms_of_a_floor_do_not_import_each_other_both_ways():
    pairs = {(module_of(path).split(".")[0], other.split(".")[0]) for path in FILES for other in imported(path)}
    for a, b in pairs:
        both_ways = a != b and (b, a) in pairs and {a, b} != {"model", "weights"}  # the model reads weights.table, the ground floor
        assert not both_ways, f"{a} and {b} import each other"

"""Retention: how much of what images say is left after compression, between a lower and an upper bound, as the paper states it.

retention = (result - lower) / (upper - lower), in percent; the paper's average is the mean over its seven benchmarks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.records import read_json

Figures = Mapping[str, float | None]  # by benchmark; None where only a server scores

TITLES = {"gqa": "GQA", "vqav2": "VQAv2", "mmbench": "MMBench", "mme": "MME-P", "pope": "POPE", "seed": "SEED", "sqa": "SQA-I"}


def _row(*figures: float) -> dict[str, float]:
    return dict(zip(TITLES, figures, strict=True))


UPPER, LOWER = "upper bound", "lower bound"
PAPER = {  # arXiv 2512.08240: 576 tokens an image in the upper bound, 1 in every other row
    UPPER: _row(61.1, 77.7, 64.0, 1487.2, 85.0, 57.9, 66.5),
    "Q-Former": _row(51.1, 63.4, 51.7, 1079.7, 77.3, 47.2, 62.7),
    "average pooling": _row(52.9, 65.0, 55.5, 1210.3, 79.1, 50.3, 62.2),
    "VoCo-LLaMA": _row(57.4, 71.8, 57.9, 1241.4, 81.5, 48.8, 66.3),
    "HTC-VLM": _row(57.6, 72.4, 60.0, 1265.2, 82.8, 49.8, 67.7),
    LOWER: _row(37.7, 41.2, 22.3, 617.3, 53.9, 36.9, 60.7),
}


@dataclass(frozen=True)
class Bounds:
    """Raises ConfigError where both have the same figure."""

    upper: Figures
    lower: Figures

    def __post_init__(self):
        for name, upper in self.upper.items():
            if upper is not None and upper == self.lower.get(name):
                raise ConfigError(f"{name}: both bounds are {upper}; wanted two figures to measure between")

    def retention(self, result: Figures) -> dict[str, float]:
        """Percent, of the benchmarks that have a figure here and in both bounds."""
        found = {}
        for name, figure in result.items():
            upper, lower = self.upper.get(name), self.lower.get(name)
            if None not in (figure, upper, lower):
                found[name] = 100 * (figure - lower) / (upper - lower)
        return found


PAPER_BOUNDS = Bounds(PAPER[UPPER], PAPER[LOWER])


def mean(retention: Mapping[str, float]) -> float | None:
    return sum(retention.values()) / len(retention) if retention else None


def read_figures(path: Path) -> dict[str, float | None]:
    """Figures by benchmark from a JSON object of them, or from the summary.json of an evaluation."""
    tree = read_json(path, dict)
    if isinstance(tree.get("benchmarks"), dict):
        tree = {name: scored.get("figure") for name, scored in tree["benchmarks"].items() if isinstance(scored, dict)}
    for name, figure in tree.items():
        if figure is not None and (isinstance(figure, bool) or not isinstance(figure, (int, float))):
            raise ConfigError(f"{path}: {name} is {json.dumps(figure)}, wanted a number")
    return tree


def table(rows: Mapping[str, Figures], titles: Mapping[str, str], bounds: Bounds | None = None) -> str:
    """Markdown: figures of each row by benchmark; between bounds also each row's mean retention, over the benchmarks shown."""
    lines = [[label, *(_shown(figures.get(name)) for name in titles)] for label, figures in rows.items()]
    if bounds is None:
        return markdown(["", *titles.values()], lines)
    for line, figures in zip(lines, rows.values(), strict=True):
        line.append(_shown(mean(bounds.retention({name: figures.get(name) for name in titles}))))
    return markdown(["", *titles.values(), "Avg. %"], lines)


def result_table(label: str, figures: Figures, titles: Mapping[str, str], bounds: Bounds | None) -> str:
    """`table` of one model; between bounds, these beside it, and its retention by benchmark in a last row."""
    if bounds is None:
        return table({label: figures}, titles)
    retention = bounds.retention(figures)
    last = ["retention %", *(_shown(retention.get(name)) for name in titles), _shown(mean(retention))]
    return f"{table({UPPER: bounds.upper, label: figures, LOWER: bounds.lower}, titles, bounds)}\n{_line(last)}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(_line, (head, ["---"] * len(head), *lines)))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.1f}"

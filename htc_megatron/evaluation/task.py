"""What a benchmark is: its questions, the rules by which answers are scored, and the file that its server wants."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Picture = Path | bytes  # a file, or an encoded image


@dataclass(frozen=True)
class Item:
    """One prompt to one image.

    key: unique within the task and the same in every run: answers on disk are matched by it. image: several are frames of a video.
    prompt: the text of the user's turn, without <image>.
    """

    key: str
    image: Picture | tuple[Picture, ...]
    prompt: str
    max_new_tokens: int = 16


@dataclass(frozen=True)
class Scores:
    """figure: the number of the paper's table, in percent (MME: points). parts: by category and in total, in the order to be printed.
    counts: questions of a part, under the same keys, where it has a count.
    """

    figure: float
    parts: dict[str, float]
    counts: dict[str, int] = field(default_factory=dict)


class Task(Protocol):
    """name: key on the command line. title: the column's head in the paper's table.

    Made from the folder of its files, which it reads and checks: ConfigError names the file, the record, and what was wanted.
    """

    name: str
    title: str
    items: list[Item]

    def __init__(self, root: Path, **options: Any): ...

    def score(self, answers: dict[str, str]) -> Scores | None:
        """Of the model's texts by item key; None where only a server scores. Raises ConfigError where keys are missing or unknown."""
        ...

    def submission(self, answers: dict[str, str], folder: Path) -> Path | None:
        """Write the benchmark's own submission file into `folder`; None where it has none."""
        ...

"""MMBench, the development split of July 2023: up to four options, asked once in every order.

File, from https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv (more: open-compass/MMBench):
    mmbench_dev_20230712.tsv    index, question, hint, A to D, answer, category, image, l2-category, split; image in base64
A question's row is followed by copies with turned options, whose indices are k million higher and whose image is the same; in the form
for VLMEvalKit an image cell may also be the index of a row that has it. The published figure is that of circular evaluation: a question
is right if every one of its rows is. LLaVA-1.5-13B's published answers give 67.7 by these rules.
"""

import base64
import binascii
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.choices import ANSWER_TOKENS, accuracies, chosen, lettered
from htc_megatron.evaluation.records import existing, paired
from htc_megatron.evaluation.spreadsheets import read_tsv, require_openpyxl, write_xlsx
from htc_megatron.evaluation.task import Item, Scores

STEP = 1_000_000  # between the indices of a question's rows
OPTIONS = "ABCD"
COLUMNS = ("index", "question", "hint", *OPTIONS, "answer", "category", "image", "l2-category", "split")
MISSING = {"", "n/a", "na", "nan", "none", "null"}  # cells that pandas and LLaVA's evaluation take for empty


@dataclass(frozen=True)
class Row:
    """index: k million above that of the question in its first order."""

    index: int
    question: str
    hint: str
    options: tuple[str, ...]
    answer: str
    category: str
    l2_category: str
    split: str

    @property
    def first(self) -> int:
        return self.index % STEP

    def turned(self, by: int) -> "Row":
        """The row with its options moved down by so many places, the last ones to the top."""
        cut = len(self.options) - by
        answer = OPTIONS[(OPTIONS.index(self.answer) + by) % len(self.options)]
        return replace(self, index=self.index + by * STEP, options=self.options[cut:] + self.options[:cut], answer=answer)


class MMBench:
    name, title = "mmbench", "MMBench"

    def __init__(self, root: Path, circular: bool = True):
        """circular: ask in every order, by the file's copies, or by ones made here where it has none; else in the first order alone."""
        path = existing(root, "mmbench_dev_20230712.tsv")
        if circular:
            require_openpyxl("mmbench's submission")  # said now, and not when everything is answered
        rows, images = _read(path)
        first = [row for row in rows if row.index < STEP]
        if circular and len(first) == len(rows):
            rows = [row.turned(by) for row in rows for by in range(len(row.options))]
        self.circular, self.rows = circular, {str(row.index): row for row in (rows if circular else first)}
        self.items = [Item(key, images[row.first], prompt(row), ANSWER_TOKENS) for key, row in self.rows.items()]

    def score(self, answers: dict[str, str]) -> Scores:
        """Accuracy by l2-category, by category and of all; where every order was asked, also that of the first order alone."""
        hits: dict[int, list[bool]] = defaultdict(list)
        right: dict[str, list[bool]] = defaultdict(list)
        for item, text in paired(self.name, self.items, answers):
            row = self.rows[item.key]
            hits[row.first].append(chosen(text, row.options) == row.answer)
            if self.circular and row.index < STEP:
                right["first order"].append(hits[row.first][-1])
        for index, of_question in hits.items():
            row = self.rows[str(index)]
            for part in (f"l2-category: {row.l2_category}", f"category: {row.category}", "all"):
                right[part].append(all(of_question))
        kinds = ("l2-category", "category", "first order", "all")
        order = sorted(right, key=lambda part: (kinds.index(part.split(":")[0]), part))
        return accuracies({part: right[part] for part in order}, "all")

    def submission(self, answers: dict[str, str], folder: Path) -> Path | None:
        """The server's xlsx; None without circular evaluation, since the server wants every row."""
        if not self.circular:
            return None
        table = [("index", "question", *OPTIONS, "prediction", "answer", "split")]
        for item, text in paired(self.name, self.items, answers):
            row = self.rows[item.key]
            options = (*row.options, *[None] * (len(OPTIONS) - len(row.options)))
            table.append((row.index, row.question, *options, text, row.answer, row.split))
        return write_xlsx(table, folder / "mmbench_dev_20230712.xlsx")


def prompt(row: Row) -> str:
    return lettered(f"{row.hint}\n{row.question}" if row.hint else row.question, row.options)


def _read(path: Path) -> tuple[list[Row], dict[int, bytes]]:
    """Rows, and the encoded image of every question."""
    rows: dict[int, Row] = {}
    cells: dict[int, str] = {}
    for number, values in read_tsv(path, COLUMNS):
        where = f"{path}: line {number}"
        row = _row(values, where)
        if row.index in rows:
            raise ConfigError(f"{where}: index {row.index} is there twice")
        rows[row.index] = row
        if row.index < STEP:
            cells[row.index] = values["image"]
    if lost := [index for index, row in rows.items() if row.first not in cells]:
        raise ConfigError(f"{path}: index {lost[0]} is a copy of {lost[0] % STEP}, which is not there")
    return list(rows.values()), {index: _image(index, cells, path) for index in cells}


def _row(values: dict[str, str], where: str) -> Row:
    def text(column: str) -> str:
        return "" if values[column].lower() in MISSING else values[column]

    index, answer = values["index"], values["answer"]
    if not index.isdecimal():
        raise ConfigError(f"{where}: index is {index!r}, wanted a number")
    options = [text(letter) for letter in OPTIONS]
    options = options[: options.index("")] if "" in options else options
    if len(options) < 2:
        raise ConfigError(f"{where}: {len(options)} options, wanted 2 to {len(OPTIONS)}")
    if answer not in list(OPTIONS[: len(options)]):
        raise ConfigError(f"{where}: answer is {answer!r}, wanted a letter of its {len(options)} options")
    rest = (values["category"], values["l2-category"], values["split"])
    return Row(int(index), values["question"], text("hint"), tuple(options), answer, *rest)


def _image(index: int, cells: dict[int, str], path: Path) -> bytes:
    cell = cells[index]
    if cell.isdecimal() and int(cell) in cells:
        cell = cells[int(cell)]
    try:
        if image := base64.b64decode(cell, validate=True):
            return image
    except binascii.Error:
        pass
    raise ConfigError(f"{path}: image of index {index} is {cell[:20]!r}, wanted base64, or the index of a row that has it")

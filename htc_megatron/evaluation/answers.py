"""A task's answers on disk, chunk by chunk, so that a run that was cut off goes on where it was.

OUT/{task}.jsonl: a first line that says what makes the answers, then a line an answer:
    {"task": "gqa", "maker": {"model": SHA-256, "folder": "runs/hf", "generation": {"dtype": "auto", "do_sample": false}}}
    {"key": "201307251", "prompt": SHA-256 of the prompt and its limit, "answer": "yes"}
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from htc_megatron.config import ConfigError
from htc_megatron.data.shards import fsync
from htc_megatron.evaluation.records import parse, read_bytes
from htc_megatron.evaluation.task import Item, Task

PARTS = {".json", ".jinja", ".model", ".safetensors"}  # of an exported folder: what decides an answer
ELSEWHERE = "name another --out, or remove the file"


@dataclass(frozen=True)
class Maker:
    """What makes answers. model: `fingerprint` of `folder`. generation: settings that decide them."""

    model: str
    folder: str
    generation: dict[str, Any]


@dataclass(frozen=True)
class Header:
    task: str
    maker: Maker


@dataclass(frozen=True)
class Row:
    key: str
    prompt: str
    answer: str


def fingerprint(folder: Path) -> str:
    """SHA-256 of an exported folder's weights, configurations, tokenizer and template."""

    def of_file(path: Path) -> str:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    files = sorted(path for path in folder.iterdir() if path.suffix in PARTS)
    with ThreadPoolExecutor() as threads:  # hashing lets the interpreter's lock go
        made = [(path.name, digest) for path, digest in zip(files, threads.map(of_file, files), strict=True)]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def prompt_hash(item: Item) -> str:
    return hashlib.sha256(json.dumps([item.prompt, item.max_new_tokens]).encode()).hexdigest()[:16]


class AnswerFile:
    """Answers of `task` in `folder`, those that are there already among them; a last line that was cut off is dropped.

    Raises ConfigError where they are another model's, to other prompts, under other settings, or damaged.
    """

    def __init__(self, folder: Path, task: Task, maker: Maker):
        self.path = folder / f"{task.name}.jsonl"
        self.prompts = {item.key: prompt_hash(item) for item in task.items}
        self.answers: dict[str, str] = {}
        data = read_bytes(self.path) if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            self.path.write_text(json.dumps(asdict(Header(task.name, maker))) + "\n", encoding="utf-8")
            return
        first, *rest = whole.split(b"\n")[:-1]
        self._same(parse(first, Header, f"{self.path}: line 1"), Header(task.name, maker))
        for number, line in enumerate(rest, 2):
            self._take(parse(line, Row, f"{self.path}: line {number}"))
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))

    @property
    def complete(self) -> bool:
        return self.prompts.keys() <= self.answers.keys()

    def append(self, answers: Mapping[str, str]) -> None:
        """Answers by key; they are on disk when this returns."""
        rows = [asdict(Row(key, self.prompts[key], answer)) for key, answer in answers.items()]
        with self.path.open("a", encoding="utf-8") as opened:
            opened.write("".join(json.dumps(row) + "\n" for row in rows))
        fsync(self.path)
        self.answers |= answers

    def _same(self, seen: Header, wanted: Header) -> None:
        if seen.maker.model != wanted.maker.model:
            pair = [f"{maker.folder} ({maker.model[:12]})" for maker in (seen.maker, wanted.maker)]
            raise ConfigError(f"{self.path} holds answers of another model, {pair[0]}, wanted {pair[1]}; {ELSEWHERE}")
        if seen.maker.generation != wanted.maker.generation:
            pair = [json.dumps(maker.generation) for maker in (seen.maker, wanted.maker)]
            raise ConfigError(f"{self.path} was made with the settings {pair[0]}, wanted {pair[1]}; {ELSEWHERE}")
        if seen.task != wanted.task:
            raise ConfigError(f"{self.path} answers the benchmark {seen.task!r}, wanted {wanted.task!r}; {ELSEWHERE}")

    def _take(self, row: Row) -> None:
        wanted = self.prompts.get(row.key)
        if wanted is None:
            raise ConfigError(f"{self.path} answers {row.key!r}, which is none of the {len(self.prompts)} questions; {ELSEWHERE}")
        if row.prompt != wanted:
            raise ConfigError(f"{self.path} answers {row.key!r} to another prompt, {row.prompt}, wanted {wanted}; {ELSEWHERE}")
        self.answers[row.key] = row.answer

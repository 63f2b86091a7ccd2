"""VQAv2: short answers by the VQA accuracy over ten annotators, or a submission where only the server has their answers.

Files, from https://visualqa.org/download.html:
    v2_OpenEnded_mscoco_{split}_questions.json    split: val2014, test-dev2015, test2015
    v2_mscoco_val2014_annotations.json
    val2014/COCO_val2014_{image_id, 12 digits}.jpg, test2015/COCO_test2015_{image_id, 12 digits}.jpg
The server wants an answer to every question of test2015, of test-dev2015 too: those that were not asked get an empty one.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.records import existing, paired, read_json
from htc_megatron.evaluation.task import Item, Scores
from htc_megatron.evaluation.tasks.prompts import SHORT
from htc_megatron.evaluation.vqa_answers import accuracy, for_server

IMAGES = {"val2014": "val2014", "test-dev2015": "test2015", "test2015": "test2015"}  # of a split
ANSWER_TYPES = ("yes/no", "number", "other")


@dataclass(frozen=True)
class Question:
    question_id: int
    image_id: int
    question: str


@dataclass(frozen=True)
class Questions:
    questions: list[Question]


@dataclass(frozen=True)
class Given:
    answer: str


@dataclass(frozen=True)
class Annotation:
    question_id: int
    answer_type: str
    answers: list[Given]


@dataclass(frozen=True)
class Annotations:
    annotations: list[Annotation]


def questions_file(split: str) -> str:
    return f"v2_OpenEnded_mscoco_{split}_questions.json"


class VQAv2:
    """split: val2014 where its questions are there, else test-dev2015, else test2015, unless it is named."""

    name, title = "vqav2", "VQAv2"

    def __init__(self, root: Path, split: str = ""):
        if split and split not in IMAGES:
            raise ConfigError(f"vqav2.split is {split!r}, wanted one of {', '.join(IMAGES)}")
        path = existing(root, *map(questions_file, [split] if split else IMAGES))
        self.split = split or next(known for known in IMAGES if questions_file(known) == path.name)
        questions = read_json(path, Questions).questions
        folder = IMAGES[self.split]
        images = existing(root, folder)
        self.items = [Item(str(q.question_id), images / f"COCO_{folder}_{q.image_id:012}.jpg", f"{q.question}\n{SHORT}") for q in questions]
        self.annotations: dict[str, Annotation] = {}
        self.submitted = [q.question_id for q in questions]
        if self.split == "val2014":
            self._annotate(existing(root, "v2_mscoco_val2014_annotations.json"))
        elif self.split == "test-dev2015":
            whole = read_json(existing(root, questions_file("test2015")), Questions)
            self.submitted = [q.question_id for q in whole.questions]

    def _annotate(self, path: Path) -> None:
        self.annotations = {str(a.question_id): a for a in read_json(path, Annotations).annotations}
        for item in self.items:
            if item.key not in self.annotations:
                raise ConfigError(f"{path}: question {item.key} has no annotation")
            if not self.annotations[item.key].answers:
                raise ConfigError(f"{path}: question {item.key} has no answer, wanted those of ten annotators")

    def score(self, answers: dict[str, str]) -> Scores | None:
        """VQA accuracy by type of answer and of all; None for a split whose answers only the server has."""
        pairs = paired(self.name, self.items, answers)
        if not self.annotations:
            return None
        found: dict[str, list[float]] = defaultdict(list)
        for item, text in pairs:
            annotation = self.annotations[item.key]
            right = accuracy(text, [given.answer for given in annotation.answers])
            found[annotation.answer_type].append(right)
            found["all"].append(right)
        order = [*(kind for kind in ANSWER_TYPES if kind in found), *sorted(found.keys() - {*ANSWER_TYPES, "all"}), "all"]
        parts = {kind: 100 * sum(found[kind]) / len(found[kind]) for kind in order}
        return Scores(parts["all"], parts, {kind: len(found[kind]) for kind in order})

    def submission(self, answers: dict[str, str], folder: Path) -> Path | None:
        """[{question_id, answer}] for the server; None where the annotations are here."""
        asked = {item.key: for_server(text) for item, text in paired(self.name, self.items, answers)}
        if self.annotations:
            return None
        path = folder / f"vqav2_{self.split}_submission.json"
        made = [{"question_id": number, "answer": asked.get(str(number), "")} for number in self.submitted]
        path.write_text(json.dumps(made) + "\n", encoding="utf-8")
        return path

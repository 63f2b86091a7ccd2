"""GQA, the balanced test-dev questions: short answers by exact match.

Files, from https://cs.stanford.edu/people/dorarad/gqa/download.html:
    testdev_balanced_questions.json
    images/{imageId}.jpg
An answer is compared without its final period and in lower case, as LLaVA hands its own to the official eval.py.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from htc_megatron.evaluation.records import existing, paired, read_json
from htc_megatron.evaluation.task import Item, Scores
from htc_megatron.evaluation.tasks.prompts import SHORT

SEMANTIC = {"attr": "attribute", "cat": "category", "global": "scene", "obj": "object", "rel": "relation"}  # eval.py's names


@dataclass(frozen=True)
class Types:
    structural: str
    semantic: str


@dataclass(frozen=True)
class Question:
    question: str
    imageId: str
    answer: str
    types: Types


def normalise(text: str) -> str:
    return text.rstrip(".").lower()


class GQA:
    name, title = "gqa", "GQA"

    def __init__(self, root: Path):
        self.questions = read_json(existing(root, "testdev_balanced_questions.json"), dict[str, Question])
        images = existing(root, "images")
        self.items = [Item(key, images / f"{q.imageId}.jpg", f"{q.question}\n{SHORT}") for key, q in self.questions.items()]

    def score(self, answers: dict[str, str]) -> Scores:
        """Accuracy of binary and open questions, by structural and by semantic type, and of all."""
        right: dict[str, list[bool]] = defaultdict(list)
        for item, text in paired(self.name, self.items, answers):
            question = self.questions[item.key]
            types = question.types
            kinds = (
                "open" if types.structural == "query" else "binary",
                f"structural: {types.structural}",
                f"semantic: {SEMANTIC.get(types.semantic, types.semantic)}",
                "all",
            )
            for kind in kinds:
                right[kind].append(normalise(text) == question.answer)
        order = sorted(right, key=lambda kind: (kind == "all", ":" in kind, kind))
        parts = {kind: 100 * sum(right[kind]) / len(right[kind]) for kind in order}
        return Scores(parts["all"], parts, {kind: len(right[kind]) for kind in order})

    def submission(self, answers: dict[str, str], folder: Path) -> Path:
        """What the official eval.py reads."""
        made = [{"questionId": item.key, "prediction": normalise(text)} for item, text in paired(self.name, self.items, answers)]
        path = folder / "testdev_balanced_predictions.json"
        path.write_text(json.dumps(made) + "\n", encoding="utf-8")
        return path

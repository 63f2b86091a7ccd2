"""POPE: is an object in the image? Yes or no, about objects chosen in three ways.

Files, from https://github.com/AoiDragon/POPE (output/coco) and https://cocodataset.org:
    coco/coco_pope_{random,popular,adversarial}.json    one question a line
    val2014/{image}
An answer is judged as LLaVA's evaluation does: its first sentence is "no" where one of its words is No, no or not, else "yes".
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from htc_megatron.evaluation.records import existing, paired, read_lines
from htc_megatron.evaluation.task import Item, Scores
from htc_megatron.evaluation.tasks.prompts import SHORT

CATEGORIES = ("random", "popular", "adversarial")
NEGATIVE = {"No", "no", "not"}


@dataclass(frozen=True)
class Question:
    question_id: int
    image: str
    text: str
    label: Literal["yes", "no"]


def says_yes(text: str) -> bool:
    first = text.split(".")[0].replace(",", "")
    return NEGATIVE.isdisjoint(first.split(" "))


class POPE:
    name, title = "pope", "POPE"

    def __init__(self, root: Path):
        annotations = existing(root, "coco")
        images = existing(root, "val2014")
        self.labels: dict[str, bool] = {}
        self.items = []
        for category in CATEGORIES:
            for q in read_lines(existing(annotations, f"coco_pope_{category}.json"), Question):
                key = f"{category}/{q.question_id}"
                self.labels[key] = q.label == "yes"
                # a long answer's "no" may come late, but a word ends most
                self.items.append(Item(key, images / q.image, f"{q.text}\n{SHORT}", max_new_tokens=128))

    def score(self, answers: dict[str, str]) -> Scores:
        """Accuracy, precision, recall, F1 and the share of yes by category, in percent; the figure is the mean F1."""
        judged: dict[str, list[tuple[bool, bool]]] = {category: [] for category in CATEGORIES}
        for item, text in paired(self.name, self.items, answers):
            judged[item.key.split("/")[0]].append((says_yes(text), self.labels[item.key]))
        parts, counts = {}, {}
        for category, pairs in judged.items():
            for measure, value in measures(pairs).items():
                parts[f"{category} {measure}"] = 100 * value
                counts[f"{category} {measure}"] = len(pairs)
        figure = sum(parts[f"{category} F1"] for category in CATEGORIES) / len(CATEGORIES)
        return Scores(figure, parts | {"mean F1": figure}, counts | {"mean F1": len(self.items)})

    def submission(self, answers: dict[str, str], folder: Path) -> None:
        return None


def measures(pairs: list[tuple[bool, bool]]) -> dict[str, float]:
    """Of (said, true) pairs; what would divide by nothing is 0."""
    both, said, true = (sum(map(of, pairs)) for of in (all, lambda pair: pair[0], lambda pair: pair[1]))
    right = sum(answer == label for answer, label in pairs)
    return {
        "accuracy": _share(right, len(pairs)),
        "precision": _share(both, said),
        "recall": _share(both, true),
        "F1": _share(2 * both, said + true),
        "yes ratio": _share(said, len(pairs)),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0

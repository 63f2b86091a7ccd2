"""SEED-Bench: four options to an image or a video, in twelve kinds of questions.

Files, from https://huggingface.co/datasets/AILab-CVC/SEED-Bench and its DATASET.md:
    SEED-Bench.json
    SEED-Bench-image/{data_id}
    SEED-Bench-video-image/{question_type_id}_{question_id}.png
The last are the frames in the middle of the videos' segments, taken beforehand, as in LLaVA-1.5's evaluation, whose
extract_video_frames.py writes them: the one frame stands for the video. The paper quotes the accuracy of all questions.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.choices import ANSWER_TOKENS, accuracies, chosen, lettered
from htc_megatron.evaluation.records import existing, paired, read_json
from htc_megatron.evaluation.task import Item, Scores


@dataclass(frozen=True)
class Question:
    question_id: str | int
    question_type_id: int
    data_type: Literal["image", "video"]
    data_id: str
    question: str
    choice_a: str | int | float
    choice_b: str | int | float
    choice_c: str | int | float
    choice_d: str | int | float
    answer: Literal["A", "B", "C", "D"]

    @property
    def options(self) -> list[str]:
        return [str(choice) for choice in (self.choice_a, self.choice_b, self.choice_c, self.choice_d)]


@dataclass(frozen=True)
class Annotations:
    """question_type: a number by name."""

    question_type: dict[str, int]
    questions: list[Question]


class SEEDBench:
    name, title = "seed", "SEED"

    def __init__(self, root: Path, images_only: bool = False):
        """images_only: leave video questions out; the figure is then that of images, which the paper's is not."""
        path = existing(root, "SEED-Bench.json")
        read = read_json(path, Annotations)
        self.types = {number: kind for kind, number in read.question_type.items()}
        self.questions: dict[str, Question] = {}
        for place, q in enumerate(read.questions):
            key = str(q.question_id)
            if q.question_type_id not in self.types:
                raise ConfigError(f"{path}: questions: {place}: question_type_id is {q.question_type_id}, wanted one of question_type's")
            if key in self.questions:
                raise ConfigError(f"{path}: questions: {place}: question_id {key} is there twice")
            if q.data_type == "image" or not images_only:
                self.questions[key] = q
        self.items = [Item(key, _picture(root, q), lettered(q.question, q.options), ANSWER_TOKENS) for key, q in self.questions.items()]
        frames = [item.image for item in self.items if self.questions[item.key].data_type == "video"]
        if lacking := [frame for frame in frames if not frame.is_file()]:
            seen = f"{len(lacking)} of {len(frames)} videos have no frame, {lacking[0]} among them"
            raise ConfigError(f"{path}: {seen}; wanted all, or seed.images_only=true, which asks about images alone")

    def score(self, answers: dict[str, str]) -> Scores:
        """Accuracy by kind of question, of images, of videos, and of all."""
        right: dict[str, list[bool]] = {part: [] for part in (*(self.types[n] for n in sorted(self.types)), "image", "video", "all")}
        for item, text in paired(self.name, self.items, answers):
            q = self.questions[item.key]
            for part in (self.types[q.question_type_id], q.data_type, "all"):
                right[part].append(chosen(text, q.options) == q.answer)
        return accuracies(right, "all")

    def submission(self, answers: dict[str, str], folder: Path) -> Path:
        """The leaderboard's results.json, a line a question: the letter, or the whole answer where it names none."""
        path = folder / "results.json"
        with path.open("w", encoding="utf-8") as file:
            for item, text in paired(self.name, self.items, answers):
                q = self.questions[item.key]
                line = {"question_id": q.question_id, "prediction": chosen(text, q.options) or text}
                file.write(json.dumps(line) + "\n")
        return path


def _picture(root: Path, question: Question) -> Path:
    if question.data_type == "image":
        return root / "SEED-Bench-image" / question.data_id
    return root / "SEED-Bench-video-image" / f"{question.question_type_id}_{question.question_id}.png"

"""ScienceQA-Image: the multiple-choice questions of the test split that have an image.

Files, from https://github.com/lupantech/ScienceQA (data/scienceqa, and tools/download.sh for the images):
    problems.json, pid_splits.json
    images/test/{pid}/image.png
Prompts are those of LLaVA-1.5's llava_test_CQM-A.json: the hint as context, the question, the options.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.choices import ANSWER_TOKENS, LETTERS, accuracies, chosen, lettered
from htc_megatron.evaluation.records import existing, paired, read_json
from htc_megatron.evaluation.task import Item, Scores

GRADES = {f"grade{number}": "grades 1-6" if number <= 6 else "grades 7-12" for number in range(1, 13)}


@dataclass(frozen=True)
class Problem:
    """answer: the number of the right choice. image: the name of its file, None without one."""

    question: str
    choices: list[str]
    answer: int
    hint: str
    image: str | None
    grade: str
    subject: str


class ScienceQA:
    name, title = "sqa", "SQA-I"

    def __init__(self, root: Path):
        path, splits = existing(root, "problems.json"), existing(root, "pid_splits.json")
        problems, parts = read_json(path, dict[str, Problem]), read_json(splits, dict[str, list[str]])
        if "test" not in parts:
            raise ConfigError(f"{splits} has no split 'test', only {', '.join(parts)}")
        test = parts["test"]
        if unknown := [pid for pid in test if pid not in problems]:
            raise ConfigError(f"{splits}: test: {len(unknown)} of {len(test)} problems are not in {path}, {unknown[0]!r} among them")
        self.problems = {pid: problems[pid] for pid in test if problems[pid].image}
        for pid, problem in self.problems.items():
            _check(problem, f"{path}: {pid}")
        images = existing(root, "images") / "test"
        self.items = [Item(pid, images / pid / p.image, prompt(p), ANSWER_TOKENS) for pid, p in self.problems.items()]

    def score(self, answers: dict[str, str]) -> Scores:
        """Accuracy by subject, by grades, and of all."""
        right: dict[str, list[bool]] = defaultdict(list)
        for item, text in paired(self.name, self.items, answers):
            problem = self.problems[item.key]
            hit = chosen(text, problem.choices) == LETTERS[problem.answer]
            for part in (problem.subject, GRADES[problem.grade], "all"):
                right[part].append(hit)
        order = sorted(right, key=lambda part: (part == "all", part in GRADES.values(), part))
        return accuracies({part: right[part] for part in order}, "all")

    def submission(self, answers: dict[str, str], folder: Path) -> None:
        return None


def prompt(problem: Problem) -> str:
    context = f"Context: {problem.hint}\n" if problem.hint else ""
    return lettered(context + problem.question, problem.choices).replace("  ", " ")  # as LLaVA's file has it


def _check(problem: Problem, where: str) -> None:
    if not 2 <= len(problem.choices) <= len(LETTERS):
        raise ConfigError(f"{where} has {len(problem.choices)} choices, wanted 2 to {len(LETTERS)}")
    if not 0 <= problem.answer < len(problem.choices):
        raise ConfigError(f"{where}: answer is {problem.answer}, wanted the number of one of its {len(problem.choices)} choices")
    if problem.grade not in GRADES:
        raise ConfigError(f"{where}: grade is {problem.grade!r}, wanted grade1 to grade12")

"""MME: two yes-or-no questions to an image, one right with yes and one with no.

Files, as its authors hand them out (https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation):
    MME_Benchmark_release_version/{task}/images/{name}.jpg or .png
    MME_Benchmark_release_version/{task}/questions_answers_YN/{name}.txt
or, for tasks without these folders, both in MME_Benchmark_release_version/{task}/; newer releases put all into a folder MME_Benchmark
in there. A text file has lines "question<TAB>Yes" or "question<TAB>No".
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.records import existing, paired, read_bytes
from htc_megatron.evaluation.task import Item, Scores
from htc_megatron.evaluation.tasks.prompts import SHORT

GROUPS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}
ASIDE = "Please answer yes or no."  # of every question; LLaVA's prompts have SHORT in its place
SUFFIXES = (".jpg", ".png", ".jpeg")
QUESTIONS = 2  # of an image


@dataclass(frozen=True)
class Question:
    task: str
    file: str
    text: str
    answer: str


def judge(text: str) -> str:
    """yes, no or other, by the first four characters."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


class MME:
    name, title = "mme", "MME-P"

    def __init__(self, root: Path):
        release = existing(root, "MME_Benchmark_release_version")
        release = next((path for path in [release / "MME_Benchmark"] if path.is_dir()), release)
        self.questions: dict[str, Question] = {}
        self.items: list[Item] = []
        for task in (task for tasks in GROUPS.values() for task in tasks):
            self._read(task, existing(release, task))

    def _read(self, task: str, folder: Path) -> None:
        split = (folder / "questions_answers_YN").is_dir()
        texts = sorted((folder / "questions_answers_YN" if split else folder).glob("*.txt"))
        if not texts:
            raise ConfigError(f"{folder} has no question file, wanted one .txt an image")
        for path in texts:
            image = existing(folder / "images" if split else folder, *(path.stem + suffix for suffix in SUFFIXES))
            for number, (question, answer) in enumerate(_pairs(path)):
                key = f"{task}/{path.stem}/{number}"
                self.questions[key] = Question(task, path.name, question, answer)
                self.items.append(Item(key, image, f"{question.removesuffix(ASIDE).rstrip()}\n{SHORT}"))

    def score(self, answers: dict[str, str]) -> Scores:
        """Of a task: accuracy + the share of images with both answers right, each to 100; of a group: the sum of its tasks."""
        right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for item, text in paired(self.name, self.items, answers):
            question = self.questions[item.key]
            right[question.task][question.file].append(judge(text) == question.answer)
        points, counts = {}, {}
        for task, images in right.items():
            accuracy = sum(map(sum, images.values())) / (QUESTIONS * len(images))
            plus = sum(map(all, images.values())) / len(images)
            points[task], counts[task] = 100 * (accuracy + plus), QUESTIONS * len(images)
        groups = {group: sum(points[task] for task in tasks) for group, tasks in GROUPS.items()}
        group_counts = {group: sum(counts[task] for task in tasks) for group, tasks in GROUPS.items()}
        return Scores(groups["perception"], points | groups, counts | group_counts)

    def submission(self, answers: dict[str, str], folder: Path) -> Path:
        """A folder of {task}.txt, which the official calculation.py reads."""
        lines: dict[str, list[str]] = defaultdict(list)
        for item, text in paired(self.name, self.items, answers):
            q = self.questions[item.key]
            lines[q.task].append("\t".join((q.file, q.text, q.answer.capitalize(), " ".join(text.split()))))
        made = folder / "mme_results"
        made.mkdir(exist_ok=True)
        for task, of_task in lines.items():
            (made / f"{task}.txt").write_text("\n".join(of_task) + "\n", encoding="utf-8")
        return made


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Questions and answers of a file. Raises ConfigError where it is not as it should be."""
    try:
        lines = [line.strip() for line in read_bytes(path).decode("utf-8").split("\n")]
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    found = []
    for number, line in enumerate(lines, 1):
        question, tab, answer = line.partition("\t")
        if line and answer.lower() not in ("yes", "no"):
            raise ConfigError(f"{path}: line {number} is {line!r}, wanted a question, a tab, and Yes or No")
        if line:
            found.append((question, answer.lower()))
    if len(found) != QUESTIONS:
        raise ConfigError(f"{path} has {len(found)} questions, wanted {QUESTIONS}")
    return found

"""easy-VQA's official test split: answers by exact match. Its files come with the package (easy_vqa.py beside this folder)."""

from pathlib import Path

from htc_megatron.evaluation.easy_vqa import image_paths, load_questions, score
from htc_megatron.evaluation.records import paired
from htc_megatron.evaluation.task import Item, Scores


class EasyVQA:
    name, title = "easy_vqa", "easy-VQA"

    def __init__(self, root: Path | None = None):
        self.questions = load_questions("test")
        images = image_paths("test")
        self.items = [Item(str(number), images[q.image], q.text, max_new_tokens=4) for number, q in enumerate(self.questions)]

    def score(self, answers: dict[str, str]) -> Scores:
        """Accuracy by type of question and of all."""
        found = score(self.questions, [text for _, text in paired(self.name, self.items, answers)])
        parts = {kind: 100 * share for kind, share in found["accuracy_by_type"].items()}
        counts = found["questions_by_type"] | {"all": found["questions"]}
        return Scores(100 * found["accuracy"], parts | {"all": 100 * found["accuracy"]}, counts)

    def submission(self, answers: dict[str, str], folder: Path) -> None:
        return None

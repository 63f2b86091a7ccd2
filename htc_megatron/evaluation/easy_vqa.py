"""easy-VQA (PyPI easy-vqa 1.0, MIT): its questions, as LLaVA conversations, and how answers to them are scored.

5,000 images of 64 pixels with one coloured shape each, 48,248 questions with 13 answers, and an official split into training
and test. Three quarters of the answers are yes or no, so a figure for all questions says little without those by type.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece
from tqdm import tqdm

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.labels import LabelledImage, LabelSet

Split = Literal["train", "test"]
SHAPES = frozenset({"circle", "rectangle", "triangle"})
QUESTION_TYPES = ("yes/no", "shape", "color")


@dataclass(frozen=True)
class Question:
    """image: the number of its image in the split."""

    image: int
    text: str
    answer: str

    @property
    def type(self) -> str:
        """yes/no, shape or color: what kind of answer the question wants."""
        return "yes/no" if self.answer in ("yes", "no") else "shape" if self.answer in SHAPES else "color"

    @property
    def about_shape(self) -> bool:
        """Whether the shape decides the answer: "what shape is it?", "is there a circle?"; not "what color is the circle?"."""
        return self.type == "shape" or (self.type == "yes/no" and not SHAPES.isdisjoint(self.text.rstrip("?").split()))


def load_questions(split: Split) -> list[Question]:
    """All questions of a split in the data set's order."""
    package = _package()
    texts, answers, images = package.get_train_questions() if split == "train" else package.get_test_questions()
    return [Question(image, text, answer) for text, answer, image in zip(texts, answers, images, strict=True)]


def image_paths(split: Split) -> list[Path]:
    """The images' files; the place in the list is the image's number."""
    package = _package()
    paths = package.get_train_image_paths() if split == "train" else package.get_test_image_paths()
    return [Path(paths[number]) for number in range(len(paths))]


def conversations(questions: Iterable[Question], questions_per_sample: int = 1, seed: int = 0) -> list[dict]:
    """LLaVA records: an image's questions in random order, dealt out to conversations of about `questions_per_sample` turns.

    Several turns a conversation share the cost of the image's tokens; an image with more questions comes in several records.
    """
    if questions_per_sample < 1:
        raise ConfigError(f"questions per sample: got {questions_per_sample}, wanted at least 1")
    by_image: dict[int, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.image, []).append(question)
    chance = random.Random(seed)
    records = []
    for image, group in sorted(by_image.items()):
        chance.shuffle(group)
        count = max(1, round(len(group) / questions_per_sample))
        for part in range(count):
            turns = [turn for question in group[part::count] for turn in _turns(question)]
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            records.append({"id": f"{image}-{part}", "image": f"{image}.png", "conversations": turns})
    return records


def labelled_images() -> LabelSet:
    """Each image's shape, as a semantic label, and colour, as a detail: what its questions take for granted or affirm."""
    images = []
    for split in ("train", "test"):
        questions, paths = load_questions(split), image_paths(split)
        colours = {question.answer for question in questions if question.type == "color"}
        words: list[set[str]] = [set() for _ in paths]
        for question in questions:
            text = question.text.rstrip("?").split()
            denied = not {"no", "not"}.isdisjoint(text)  # "is no red shape present?"
            if question.answer != ("yes" if denied else "no"):
                words[question.image].update((*text, question.answer))
        for path, said in zip(paths, words, strict=True):
            labels = {"shape": said & SHAPES, "colour": said & colours}
            images.append(LabelledImage(str(path), {name: value for name, values in labels.items() for value in values}, split))
    return LabelSet({"shape": "semantic", "colour": "detail"}, images)


def write_images(folder: str | Path, split: Split) -> None:
    """Copy a split's images to folder/{split}/, each under the name that `conversations` gives it."""
    images = Path(folder) / split
    images.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(tqdm(image_paths(split), desc=f"{split} images", unit=" images", mininterval=0.5)):
        shutil.copyfile(path, images / f"{number}.png")


def train_tokenizer(records: Iterable[dict], path: str | Path, vocab_size: int = 400, system_prompt: str = "") -> int:
    """Train a LLaMA-like sentencepiece model (BPE, byte fallback) on the text of LLaVA records; returns its number of pieces.

    The training text is spelled as the Vicuna template spells it, so that "USER", "ASSISTANT" and the set's own words become
    single pieces. Raises ConfigError where the text is too small for `vocab_size`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_spelled(records, system_prompt),
            model_prefix=str(path.with_suffix("")),
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(f"tokenizer: {vocab_size} pieces cannot be made from this text: {error}") from None
    path.with_suffix(".vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()


def majority_answers(questions: Iterable[Question], key: Callable[[Question], str]) -> dict[str, str]:
    """The most frequent answer among the questions of each key."""
    counts: dict[str, Counter] = {}
    for question in questions:
        counts.setdefault(key(question), Counter())[question.answer] += 1
    return {group: max(sorted(answers), key=answers.__getitem__) for group, answers in counts.items()}


def baselines(train: Sequence[Question], test: Sequence[Question]) -> dict[str, dict]:
    """Scores on `test` of three ways to answer without looking, learnt from `train`; each as `score` gives them.

    "majority": the most frequent answer to all questions. "majority_of_type": the most frequent one of the question's type.
    "majority_of_question": the most frequent one to the same words: what a model that is blind but can read reaches.
    """
    keys = {"majority": lambda q: "", "majority_of_type": lambda q: q.type, "majority_of_question": lambda q: q.text}
    found = {}
    for name, key in keys.items():
        answers = majority_answers(train, key)
        found[name] = score(test, [answers.get(key(question), "") for question in test])
    return found


def is_correct(prediction: str, answer: str) -> bool:
    """Exact match, but for case and surrounding white space."""
    return prediction.strip().lower() == answer.strip().lower()


def score(questions: Sequence[Question], predictions: Sequence[str]) -> dict:
    """{"questions": count, "accuracy": share, "accuracy_by_type": {type: share}, "questions_by_type": {type: count}}."""
    if len(questions) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(questions)} questions")
    if not questions:
        raise ValueError("no question to score")
    asked, right = Counter(), Counter()
    for question, prediction in zip(questions, predictions, strict=True):
        asked[question.type] += 1
        right[question.type] += is_correct(prediction, question.answer)
    types = [kind for kind in QUESTION_TYPES if asked[kind]]
    return {
        "questions": len(questions),
        "accuracy": right.total() / len(questions),
        "accuracy_by_type": {kind: right[kind] / asked[kind] for kind in types},
        "questions_by_type": {kind: asked[kind] for kind in types},
    }


def table(scores: dict, blind: dict[str, dict]) -> str:
    """What `score` and `baselines` gave, as a Markdown table."""
    columns = [scores, blind["majority_of_type"], blind["majority_of_question"], blind["majority"]]
    lines = [
        "| questions | count | accuracy | majority answer of the type | of the same question | of all |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, count in scores["questions_by_type"].items():
        lines.append(f"| {kind} | {count} | " + " | ".join(f"{column['accuracy_by_type'][kind]:.1%}" for column in columns) + " |")
    lines.append(f"| all | {scores['questions']} | " + " | ".join(f"{column['accuracy']:.1%}" for column in columns) + " |")
    return "\n".join(lines)


def _turns(question: Question) -> list[dict[str, str]]:
    return [{"from": "human", "value": question.text}, {"from": "gpt", "value": question.answer}]


def _spelled(records: Iterable[dict], system_prompt: str) -> Iterable[str]:
    """Lines as the template spells them; the line break behind <image> cuts one, as the image does when it is tokenised."""
    if system_prompt:
        yield system_prompt
    for record in records:
        for turn in record["conversations"]:
            opening = "USER:" if turn["from"] == "human" else "ASSISTANT:"
            yield f"{opening} {turn['value'].removeprefix('<image>').strip()}"


def _package():
    try:
        import easy_vqa
    except ImportError:
        raise ConfigError("easy-VQA is not installed: pip install -c constraints.txt -e '.[examples]'") from None
    return easy_vqa

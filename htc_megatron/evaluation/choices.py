"""Multiple choice: how options are asked, which letter an answer names, and the share of right ones."""

import re
from collections.abc import Mapping, Sequence

from htc_megatron.evaluation.task import Scores

LETTERS = "ABCDE"
INSTRUCTION = "Answer with the option's letter from the given choices directly."
ANSWER_TOKENS = 64  # enough for an answer that repeats its option in full
ALONE = re.compile(r"\(?([a-z])[.):]*", re.IGNORECASE)  # "B", "b.", "(B)"
LEADING = re.compile(r"(?:\(([a-z])\)|([a-z])[.):])\s", re.IGNORECASE)  # "B. acquired", "(B) acquired"
SENTENCE = re.compile(r"(?i:answer is):?[\s(*]*([A-Z])\b")


def lettered(question: str, options: Sequence[str]) -> str:
    """LLaVA-1.5's prompt: the question, a line an option, and that a letter is wanted."""
    lines = (f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return "\n".join([question, *lines, INSTRUCTION])


def chosen(text: str, options: Sequence[str]) -> str | None:
    """The letter that an answer names: by itself or in front of more, as "the answer is B" once, or by an option's text.

    None where it names none, two, or one that is not among the options; such an answer is wrong. This is what the benchmarks' own rules
    come to where no language model is asked to read an answer: LLaVA's scripts for ScienceQA and SEED-Bench, and VLMEvalKit for MMBench
    with exact matching.
    """
    text = text.strip()
    if match := ALONE.fullmatch(text) or LEADING.match(text):
        named = {next(filter(None, match.groups())).upper()}
    else:
        named = set(SENTENCE.findall(text)) or {LETTERS[i] for i, option in enumerate(options) if _plain(option) == _plain(text)}
    return named.pop() if len(named) == 1 and named <= set(LETTERS[: len(options)]) else None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def accuracies(right: Mapping[str, Sequence[bool]], figure: str) -> Scores:
    """Percent right of each part that has questions, in the order given."""
    counts = {part: len(hits) for part, hits in right.items() if hits}
    parts = {part: 100 * sum(right[part]) / count for part, count in counts.items()}
    return Scores(parts[figure], parts, counts)

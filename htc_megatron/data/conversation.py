"""LLaVA conversations to token ids with exact labels (Vicuna v1 template).

The text of a record is

    [BOS] SYSTEM USER: question ASSISTANT: answer</s>USER: question ASSISTANT: answer</s>

and is tokenised in pieces, never as one string: the prompt up to and including "ASSISTANT:", the answer with the space in
front of it, and </s> as its id. An image cuts the prompt into the piece before and the piece behind it, as LLaVA's
tokenizer_image_token does. LLaVA tokenises the whole conversation at once and finds the answers again by counting tokens of
substrings, which is off by one or more whenever the tokenizer merges across a boundary; here no token can span one, so the
labels are exactly the answers' tokens and their </s>. For LLaMA's tokenizer both give the same ids.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from htc_megatron.data.tokenizer import Tokenizer

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_INDEX = -200  # LLaVA's placeholder id in unexpanded sequences
VICUNA_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class BadRecord(ValueError):
    """A sentence that says why a record cannot be used."""


@dataclass(frozen=True)
class Template:
    """Vicuna v1 with a system prompt of choice. An empty one leaves nothing, not even its space, in front of "USER:"."""

    system: str = VICUNA_SYSTEM_PROMPT
    name: str = "vicuna_v1"

    def prompt(self, question: str, first: bool) -> str:
        """What stands in front of an answer: the turn's text up to and including "ASSISTANT:"."""
        system = f"{self.system} " if first and self.system else ""
        return f"{system}USER: {question} ASSISTANT:"


@dataclass
class Sample:
    """One tokenised conversation, images not yet expanded.

    ids: token ids, IMAGE_TOKEN_INDEX at images. supervised: same length, True on answers and their </s>.
    images: file names, one a placeholder, in order. name: the record's id.
    """

    ids: list[int] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    name: str = ""

    @property
    def num_text_tokens(self) -> int:
        return sum(i != IMAGE_TOKEN_INDEX for i in self.ids)

    @property
    def labels(self) -> list[int]:
        """ids where supervised, else -100: the labels transformers wants."""
        return [i if s else -100 for i, s in zip(self.ids, self.supervised, strict=True)]

    def add(self, ids: Iterable[int], supervised: bool = False) -> None:
        ids = list(ids)
        self.ids += ids
        self.supervised += [supervised] * len(ids)


def tokenize_record(record: dict, tokenizer: Tokenizer, template: Template, name: str = "") -> Sample:
    """Tokens and labels of one LLaVA record: {"id", "image": file | [files] | absent, "conversations": [{"from", "value"}]}.

    A leading answer without a question is dropped, as LLaVA does. Raises BadRecord with the reason.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"a record must be a JSON object, got {type(record).__name__}")
    sample = Sample(images=_images(record), name=str(record.get("id", name)))
    _begin(sample, tokenizer)
    turns = _turns(record)
    for number in range(0, len(turns), 2):
        _add_prompt(sample, turns[number], tokenizer, template, first=number == 0)
        answer = _encode(tokenizer, f" {turns[number + 1]}" if turns[number + 1] else "")
        sample.add([*answer, tokenizer.eos_token_id], supervised=True)
    wanted = sample.ids.count(IMAGE_TOKEN_INDEX)
    if wanted != len(sample.images):
        raise BadRecord(f"the questions hold {wanted} {IMAGE_TOKEN} placeholders, but the record names {len(sample.images)} images")
    return sample


def tokenize_prompt(turns: list[str], tokenizer: Tokenizer, template: Template) -> list[int]:
    """Unexpanded ids to generate from: question, answer, question, ...; the last turn is the question to answer."""
    if len(turns) % 2 == 0:
        raise ValueError(f"a prompt ends with a question: wanted an odd number of turns, got {len(turns)}")
    sample = Sample()
    _begin(sample, tokenizer)
    for number in range(0, len(turns), 2):
        _add_prompt(sample, turns[number].strip(), tokenizer, template, first=number == 0)
        if number + 1 < len(turns):
            answer = turns[number + 1].strip()
            sample.add([*_encode(tokenizer, f" {answer}" if answer else ""), tokenizer.eos_token_id])
    return sample.ids


def examples_to_samples(records: Iterable[dict], tokenizer: Tokenizer, template: Template) -> list[Sample]:
    """Every record's Sample, in order. Raises BadRecord at the first record that cannot be used."""
    return [tokenize_record(record, tokenizer, template, str(number)) for number, record in enumerate(records)]


def _begin(sample: Sample, tokenizer: Tokenizer) -> None:
    if tokenizer.bos_token_id is not None:
        sample.add([tokenizer.bos_token_id])


def _add_prompt(sample: Sample, question: str, tokenizer: Tokenizer, template: Template, first: bool) -> None:
    for number, piece in enumerate(template.prompt(question, first).split(IMAGE_TOKEN)):
        if number:
            sample.add([IMAGE_TOKEN_INDEX])
        sample.add(_encode(tokenizer, piece))


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise BadRecord(str(error)) from None


def _images(record: dict) -> list[str]:
    images = record.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(i, str) and i for i in images):
        raise BadRecord(f"image must be a file name or a list of them, got {images!r}")
    return images


def _turns(record: dict) -> list[str]:
    """Values of the turns, alternating question and answer."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRecord("the record has no conversations")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRecord(f'a turn must be {{"from": ..., "value": text}}, got {str(turn)[:80]!r}')
    if turns[0].get("from") == "gpt":
        turns = turns[1:]
    for number, turn in enumerate(turns):
        wanted = ("human", "gpt")[number % 2]
        if turn.get("from") != wanted:
            raise BadRecord(f"turn {number + 1} is from {turn.get('from')!r}, wanted {wanted!r}")
    if len(turns) % 2 or not turns:
        raise BadRecord(f"the conversation has {len(turns)} turns: the last question has no answer")
    return [turn["value"].strip() for turn in turns]

"""How likely a model finds given answers: what multiple choice by likelihood compares."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from htc_megatron.config import ConfigError
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.processing_htc_vlm import HTCVLMProcessor
from htc_megatron.inference.answer import inputs_of_rows, prompt


class Likelihood(NamedTuple):
    """log: natural logarithm of the probability of an answer's tokens, its end not among them. greedy: whether it is the greedy one."""

    log: float
    tokens: int
    greedy: bool


@torch.no_grad()
def likelihoods(
    model: HTCVLMForConditionalGeneration,
    processor: HTCVLMProcessor,
    images: Sequence[Any],
    asked: Sequence[tuple[Sequence[int], str, str]],
    batch_size: int = 64,
) -> list[Likelihood]:
    """Of each (numbers of its images in `images`, question, answer), in their order.

    images: what the processor takes. A batch holds questions about the same images together and compresses each image once.
    Raises ConfigError for an answer without a token.
    """
    before, rows = [], []
    for numbers, question, answer in asked:
        text = prompt(processor, question, len(numbers))
        before.append(len(processor.encode(text)))
        rows.append(processor.encode(f"{text} {answer.strip()}{processor.tokenizer.eos_token}")[:-1])
        if len(rows[-1]) == before[-1]:
            raise ConfigError(f"the answer {answer!r} to {question!r} has no token, wanted at least one")
    found: list[Likelihood | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: (tuple(asked[index][0]), len(rows[index])))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        tails = [len(rows[index]) - before[index] for index in batch]
        padded = processor.tokenizer.pad({"input_ids": [rows[index] for index in batch]}, padding_side="left", return_tensors="pt")
        inputs = padded.to(model.device) | inputs_of_rows(
            model, processor, images, [number for index in batch for number in asked[index][0]]
        )
        logits = model(**inputs, logits_to_keep=max(tails) + 1).logits[:, :-1].float()
        wanted = inputs["input_ids"][:, -max(tails) :]
        logs = logits.log_softmax(-1).gather(-1, wanted[:, :, None])[:, :, 0]
        logits[:, :, processor.image_token_id] = -torch.inf  # generation never gives it
        best = logits.argmax(-1) == wanted
        for row, (index, tail) in enumerate(zip(batch, tails, strict=True)):
            found[index] = Likelihood(float(logs[row, -tail:].sum()), tail, bool(best[row, -tail:].all()))
    return found

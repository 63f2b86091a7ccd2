"""Likelihoods of given answers: those of a plain pass over prompt and answer, whatever shares the batch."""

import pytest
from PIL import Image

from htc_megatron.config import ConfigError
from htc_megatron.inference import ask, likelihoods, load
from htc_megatron.weights.export import export
from tests.data_tiny import noise
from tests.hf_tiny import made

QUESTION = "is it red ?"


def exported(folder, **method):
    """A model and its processor, and two pictures."""
    reader, _ = made(folder, seed=6, **method)
    export(reader, folder / "hf")
    return *load(folder / "hf"), [picture.convert("RGB") for picture in (noise(20, 13), Image.radial_gradient("L"))]


def plain_loss(model, processor, pictures, question, given):
    """Mean over the answer's tokens, by one pass over the whole prompt."""
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    whole = processor(images=pictures or None, text=f"{prompt} {given}</s>", return_tensors="pt")
    labels = whole["input_ids"].clone()
    labels[:, : len(processor.encode(prompt))] = -100
    labels[:, -1] = -100  # </s>
    return float(model(**whole, labels=labels).loss.detach())


@pytest.mark.parametrize("method", [{}, {"image_sees": "prefix"}], ids=["alone", "prefix"])
def test_they_are_those_of_a_plain_pass(tmp_path, method):
    """Several pictures, one and none a question, answers of other lengths, and a batch that ends among them."""
    model, processor, pictures = exported(tmp_path, **method)
    asked = [
        ((0, 1), QUESTION, "no"),
        ((), QUESTION, "no it is not"),
        ((1,), QUESTION, " no "),
        ((0,), "a red shape", "yes"),
        ((1, 0), "?", "no"),
    ]
    found = likelihoods(model, processor, pictures, asked, batch_size=3)
    for likelihood, (numbers, question, given) in zip(found, asked, strict=True):
        wanted = plain_loss(model, processor, [pictures[number] for number in numbers], question, given.strip())
        assert -likelihood.log / likelihood.tokens == pytest.approx(wanted, abs=1e-5)
    assert [likelihood.tokens for likelihood in found] == [len(processor.encode(given.strip(), False)) for _, _, given in asked]


def test_the_greedy_answer_is_known(tmp_path):
    """Also where the placeholder, which is never generated, would be likelier."""
    model, processor, pictures = exported(tmp_path)
    first = ask(model, processor, pictures[:1], QUESTION, 1)
    asked = [((0,), QUESTION, text) for text in (first, "no", f"{first} no")]
    assert first == "triangle" and [likelihood.greedy for likelihood in likelihoods(model, processor, pictures, asked)] == [
        True,
        False,
        False,
    ]
    (token,) = processor.encode(first, False)
    model.lm_head.weight.data[processor.image_token_id] = 2 * model.lm_head.weight.data[token]
    assert ask(model, processor, pictures[:1], QUESTION, 1) == first
    before, after = likelihoods(model, processor, pictures, asked[:2])
    assert before.greedy and not after.greedy and before.log < -0.7


def test_an_answer_without_a_token_is_refused(tmp_path):
    model, processor, pictures = exported(tmp_path)
    with pytest.raises(ConfigError, match=f"the answer ' ' to '{QUESTION[:-1]}.' has no token, wanted at least one"):
        likelihoods(model, processor, pictures, [((0,), QUESTION, " ")])

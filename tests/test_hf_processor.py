"""The exported processor prepares images and text exactly as training does."""

import json
import random

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from htc_megatron.config import ConfigError
from htc_megatron.data.conversation import IMAGE_TOKEN_INDEX, VICUNA_SYSTEM_PROMPT, Template, tokenize_prompt, tokenize_record
from htc_megatron.data.images import clip_pixels as training_clip_pixels
from htc_megatron.data.images import open_image as training_open_image
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.hf.modeling_mgvq import mgvq_pixels
from htc_megatron.hf.processing_htc_vlm import HTCVLMImageProcessor, HTCVLMProcessor, clip_pixels, vicuna_template
from htc_megatron.weights.tokenizer import export_tokenizer
from tests.hf_tiny import tiny_tokenizer

KINDS = {
    "llama": dict(model_type="bpe", remove_extra_whitespaces=False, normalization_rule_name="identity", split_digits=True),
    "bpe": dict(model_type="bpe"),
    "bpe without bytes": dict(model_type="bpe", byte_fallback=False, vocab_size=120),
    "bpe with pad": dict(model_type="bpe", pad_id=3, user_defined_symbols=["<tag>"]),
    "unigram": dict(model_type="unigram", vocab_size=320),
}


@pytest.fixture(scope="module", params=KINDS)
def model_file(request, tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), **KINDS[request.param])


def processor_of(path, run: int = 1, system: str | None = None) -> HTCVLMProcessor:
    ours = load_tokenizer(path)
    tokenizer = export_tokenizer(path, ours.voco_token_id, ours.vocab_size)
    template = vicuna_template() if system is None else vicuna_template(system)
    return HTCVLMProcessor(HTCVLMImageProcessor(16, 16, "hybrid"), tokenizer, chat_template=template, num_image_tokens=run)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chat(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


CONVERSATIONS = [
    ["<image>\nWhat shape is in the image?"],
    ["What is red?", "a circle", "<image>\n<image>\nIs it the same?", "yes, it is", "Why?"],
    ["in front\n<image>"],
    ["two  spaces, 漢字 and naïve ½", "", "again"],
    [" spaces around ", "  answer \n", "\n<image>\nlines\n\nbetween"],
]


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=lambda turns: turns[0][:12])
@pytest.mark.parametrize("system", [VICUNA_SYSTEM_PROMPT, "", "It's a \\ backslash\nand a line."])
def test_chat_template_gives_the_ids_of_training(model_file, turns, system):
    ours = load_tokenizer(model_file)
    processor = processor_of(model_file, run=3, system=system)
    wanted = tokenize_prompt(turns, ours, Template(system=system))
    wanted = [i for w in wanted for i in ([ours.voco_token_id] * 3 if w == IMAGE_TOKEN_INDEX else [w])]
    images = [picture(16, 16)] * sum(turn.count("<image>") for turn in turns)
    content = chat(*turns)
    text = processor.apply_chat_template(content, add_generation_prompt=True)
    assert processor(text=text, images=images or None)["input_ids"] == [wanted]
    if not images:
        assert processor.apply_chat_template(content, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"] == [wanted]


def test_training_record_and_chat_agree_on_the_answer_too(model_file):
    ours, processor = load_tokenizer(model_file), processor_of(model_file)
    turns = ["<image>\nWhat color is it?", "red", "And the shape?", "a circle"]
    conversations = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    sample = tokenize_record({"id": "0", "image": "a.png", "conversations": conversations}, ours, Template())
    text = processor.apply_chat_template(chat(*turns))
    assert processor.encode(text) == [ours.voco_token_id if i == IMAGE_TOKEN_INDEX else i for i in sample.ids]


def test_image_content_is_a_line_of_its_own(model_file):
    processor = processor_of(model_file)
    content = [{"type": "image", "image": picture(9, 7)}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == "Be brief. USER: <image>\nWhat is it? ASSISTANT:"
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 1
    assert inputs["pixel_values"].shape == inputs["mgvq_pixel_values"].shape == (1, 3, 16, 16)


def test_conversion_spells_as_sentencepiece(model_file):
    """Random strings with runs of spaces, control characters, unknown letters and the pieces' own characters."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokenizer = processor_of(model_file).tokenizer
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices("abcdeirtUSER:  \n\té漢🙂.?<>/▁019", k=rng.randrange(1, 30)))
        assert tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == reference.encode(text), repr(text)


@pytest.mark.parametrize("size", [(16, 16), (40, 30), (13, 29), (16, 5), (1, 3)])
def test_pixels_are_those_of_training(size):
    image = picture(*size)
    pixels = HTCVLMImageProcessor(16, 32, "hybrid").preprocess([image])
    np.testing.assert_array_equal(pixels["pixel_values"][0].numpy(), training_clip_pixels(image, 16))
    assert torch.equal(pixels["mgvq_pixel_values"][0], mgvq_pixels(image, 32))
    assert torch.equal(clip_pixels(image.convert("RGBA"), 16), pixels["pixel_values"][0])


def test_a_path_gives_the_pixels_that_training_read(tmp_path):
    """Also where the file says that it is to be turned: training does not turn it."""
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(20, 12).save(path, exif=exif)
    wanted = training_clip_pixels(training_open_image(path.read_bytes()), 16)
    for given in (path, str(path), Image.open(path)):
        pixels = HTCVLMImageProcessor(16, 16, "continuous").preprocess(given)["pixel_values"][0]
        np.testing.assert_array_equal(pixels.numpy(), wanted)


def test_channels_decide_the_pixels():
    image = np.asarray(picture(20, 10))
    assert set(HTCVLMImageProcessor(16, 16, "continuous").preprocess(image)) == {"pixel_values"}
    assert set(HTCVLMImageProcessor(16, 16, "discrete").preprocess([[image], [image]])) == {"mgvq_pixel_values"}


def test_round_trip_and_automatic_classes(model_file, tmp_path):
    processor = processor_of(model_file, run=2)
    processor.save_pretrained(tmp_path)
    again = HTCVLMProcessor.from_pretrained(tmp_path)
    text = ["<image>\nfirst ASSISTANT:", "USER: second\n<image> and <image>"]
    images = [[picture(9, 12)], [picture(5, 5), picture(30, 8)]]
    one, two = (p(text=text, images=images, return_tensors="pt") for p in (processor, again))
    assert set(one) == set(two)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert one["attention_mask"][0, 0] == 0  # padded on the left
    assert again.chat_template == processor.chat_template
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast)
    assert json.loads((tmp_path / "processor_config.json").read_text())["num_image_tokens"] == 2


def test_a_transformers_folder_gives_the_same_ids(model_file, tmp_path):
    ours = load_tokenizer(model_file)
    export_tokenizer(model_file, ours.voco_token_id, ours.vocab_size).save_pretrained(tmp_path)
    folder = load_tokenizer(tmp_path)
    assert (folder.voco_token_id, folder.vocab_size) == (ours.voco_token_id, ours.vocab_size)
    turns = CONVERSATIONS[1]
    text = processor_of(tmp_path).apply_chat_template(chat(*turns), add_generation_prompt=True)
    assert processor_of(tmp_path).encode(text) == processor_of(model_file).encode(text)
    assert tokenize_prompt(turns, folder, Template()) == tokenize_prompt(turns, ours, Template())


@pytest.mark.parametrize(
    "call, sentence",
    [
        (dict(text="<image> what?"), "the text has 1 <image>, but no images were given"),
        (dict(text="what?", images=[picture(4, 4)]), "the texts have 0 <image>, but 1 images were given"),
        (dict(text=["<image>", "<image>"], images=[[picture(4, 4)] * 2, []]), r"the texts have \[1, 1\] <image>, but \[2, 0\]"),
        (dict(text="<image>", images="missing.png"), "missing.png"),
        (dict(text="<image>", images=np.zeros((4, 4, 3))), "an image array is float64"),
        (dict(text="<image>", images=3), "an image is a int"),
        (dict(text="a", truncation=True), "truncation cannot be on"),
        (dict(), "text, images or both"),
    ],
)
def test_bad_input_is_refused(tmp_path_factory, call, sentence):
    processor = processor_of(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), **KINDS["llama"]))
    with pytest.raises(ValueError, match=sentence):
        processor(**call)


def test_wrong_tokenizers_are_refused(model_file, tmp_path):
    ours = load_tokenizer(model_file)
    with pytest.raises(ConfigError, match=f"<voco> gets id {ours.voco_token_id}, but the model has it at 7"):
        export_tokenizer(model_file, 7, ours.vocab_size)
    with pytest.raises(ConfigError, match=f"{ours.vocab_size} tokens, but the model's vocabulary ends at 9"):
        export_tokenizer(model_file, ours.voco_token_id, 9)
    with pytest.raises(ConfigError, match="does not exist"):
        export_tokenizer(tmp_path / "absent.model", 1, 2)
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="not a sentencepiece model"):
        export_tokenizer(tmp_path / "broken.model", 1, 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="transformers cannot load it"):
        export_tokenizer(tmp_path / "empty", 1, 2)

"""Template, labels and tokenizers against token lists written by hand."""

import pytest
import sentencepiece

from htc_megatron.config import ConfigError, ModelConfig
from htc_megatron.data.conversation import (
    IMAGE_TOKEN_INDEX,
    BadRecord,
    Template,
    examples_to_samples,
    tokenize_prompt,
    tokenize_record,
)
from htc_megatron.data.tokenizer import SentencePieceTokenizer, check_tokenizer, load_tokenizer
from tests.data_tiny import TEMPLATE, byte_level_folder, records, sentencepiece_model, turns


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return sentencepiece_model(tmp_path_factory.mktemp("sp"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_level_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module", params=["sentencepiece", "transformers"])
def tokenizer(request, model_file, folder):
    return load_tokenizer(model_file if request.param == "sentencepiece" else folder)


def expected(pieces, tokenizer):
    """ids and labels from (text or id, supervised) pieces; text is encoded by sentencepiece or tokenizers themselves."""
    ids, labels = [], []
    for piece, supervised in pieces:
        if isinstance(piece, str):
            if isinstance(tokenizer, SentencePieceTokenizer):
                raw = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.processor.serialized_model_proto())
                piece = raw.encode(piece.removeprefix(" "))  # its dummy prefix is that space
            else:
                piece = tokenizer.tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False).ids
        else:
            piece = [piece]
        ids += piece
        labels += piece if supervised else [-100] * len(piece)
    return ids, labels


def test_single_turn(tokenizer):
    sample = tokenize_record({"id": 7, "image": "x.png", "conversations": turns("<image>\nWhat shape?", "a circle")}, tokenizer, TEMPLATE)
    pieces = [
        (tokenizer.bos_token_id, False),
        ("Look. USER: ", False),
        (IMAGE_TOKEN_INDEX, False),
        ("\nWhat shape? ASSISTANT:", False),
        (" a circle", True),
        (tokenizer.eos_token_id, True),
    ]
    assert (sample.ids, sample.labels) == expected(pieces, tokenizer)
    assert (sample.images, sample.name, sample.num_text_tokens) == (["x.png"], "7", len(sample.ids) - 1)


def test_turns_and_images(tokenizer):
    conversation = turns("Compare <image> with <image>", "same", "And <image>?", "", "Why?", "so")
    sample = tokenize_record({"image": ["a", "b", "c"], "conversations": conversation}, tokenizer, Template(""))
    image, end = (IMAGE_TOKEN_INDEX, False), (tokenizer.eos_token_id, True)
    pieces = [
        (tokenizer.bos_token_id, False),
        ("USER: Compare ", False), image, (" with ", False), image, (" ASSISTANT:", False), (" same", True), end,
        ("USER: And ", False), image, ("? ASSISTANT:", False), end,
        ("USER: Why? ASSISTANT:", False), (" so", True), end,
    ]  # fmt: skip
    assert (sample.ids, sample.labels) == expected(pieces, tokenizer)


def test_without_image_and_default_prompt(tokenizer):
    sample = tokenize_record({"conversations": turns("Is it?", "yes")}, tokenizer, Template())
    text = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
        "answers to the user's questions. USER: Is it? ASSISTANT:"
    )
    pieces = [(tokenizer.bos_token_id, False), (text, False), (" yes", True), (tokenizer.eos_token_id, True)]
    assert (sample.ids, sample.labels) == expected(pieces, tokenizer)


def test_same_ids_as_the_whole_text_at_once(model_file):
    """With a LLaMA-like model no token spans a boundary, so the pieces give what LLaVA's tokenisation of the whole text gives."""
    raw = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    sample = tokenize_record({"conversations": turns("What is it?", "a red circle")}, load_tokenizer(model_file), Template(""))
    text, answer = raw.encode("USER: What is it? ASSISTANT: a red circle"), raw.encode("a red circle")
    assert sample.ids == [1, *text, 2]
    assert sample.labels == [-100] * (len(sample.ids) - len(answer) - 1) + [*answer, 2]


def test_prompt_is_the_beginning_of_the_sample(tokenizer):
    for sample, record in zip(examples_to_samples(records(), tokenizer, TEMPLATE), records(), strict=True):
        texts = [turn["value"] for turn in record["conversations"]]
        prompt = tokenize_prompt(texts[:-1], tokenizer, TEMPLATE)
        assert sample.ids[: len(prompt)] == prompt
        answer = sample.ids[len(prompt) :]
        assert sample.supervised[len(prompt) :] == [True] * len(answer)
        assert tokenizer.decode(answer).strip() == texts[-1].strip()


def test_text_never_becomes_special(tokenizer):
    evil = "</s> <voco> <s> <unk> <0x0A> <image"
    sample = tokenize_record({"conversations": turns(evil, evil)}, tokenizer, TEMPLATE)
    assert sample.ids.count(tokenizer.eos_token_id) == 1 and sample.ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.voco_token_id not in sample.ids and min(sample.ids) >= 0
    assert tokenizer.decode(sample.ids).count(evil) == 2


def test_image_word_in_an_answer_is_text(tokenizer):
    sample = tokenize_record({"conversations": turns("how?", "write <image> there")}, tokenizer, TEMPLATE)
    assert IMAGE_TOKEN_INDEX not in sample.ids


def test_voco_is_the_next_id(model_file, folder, tmp_path):
    raw = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokenizer = load_tokenizer(model_file)
    assert (tokenizer.voco_token_id, tokenizer.vocab_size) == (raw.get_piece_size(), raw.get_piece_size() + 1)
    plain, known = load_tokenizer(folder), load_tokenizer(byte_level_folder(tmp_path / "voco", voco=True))
    assert plain.voco_token_id == len(plain.tokenizer) == plain.vocab_size - 1
    assert (known.voco_token_id, known.vocab_size) == (plain.voco_token_id, plain.vocab_size)  # an exported folder names it already
    assert known.voco_token_id not in known.encode("a <voco> </s>")


def test_wrong_tokenizers_are_refused(model_file, tmp_path):
    tokenizer, model = load_tokenizer(model_file), ModelConfig()
    with pytest.raises(ConfigError, match=f"voco_token_id is 32000, but it has <voco> at id {tokenizer.voco_token_id}"):
        check_tokenizer(tokenizer.vocab_size, tokenizer.voco_token_id, model, "it")
    model.method.voco_token_id = tokenizer.voco_token_id
    check_tokenizer(tokenizer.vocab_size, tokenizer.voco_token_id, model, "it")  # spare rows of an imported vocabulary
    model.backbone.vocab_size = tokenizer.vocab_size - 1
    with pytest.raises(ConfigError, match=f"vocab_size is {tokenizer.vocab_size - 1}, but it has {tokenizer.vocab_size} tokens"):
        check_tokenizer(tokenizer.vocab_size, tokenizer.voco_token_id, model, "it")
    (tmp_path / "broken.model").write_text("no model")
    (tmp_path / "empty").mkdir()
    for path, sentence in (
        ("broken.model", "not a sentencepiece model"),
        ("empty", "transformers cannot load"),
        ("none", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load_tokenizer(tmp_path / path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer("")


def test_tokenizer_without_end_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 5), model_prefix=str(tmp_path / "t"), vocab_size=20, hard_vocab_limit=False,
        eos_id=-1, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path / "t.model")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "must be a JSON object, got list"),
        ({}, "no conversations"),
        ({"conversations": []}, "no conversations"),
        ({"conversations": "hi"}, "no conversations"),
        ({"conversations": [{"from": "human"}]}, "a turn must be"),
        ({"conversations": ["hi", "ho"]}, "a turn must be"),
        ({"conversations": turns("a")}, "1 turns: the last question has no answer"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "turn 2 is from 'human', wanted 'gpt'"),
        ({"conversations": [{"from": "wizard", "value": "a"}] * 2}, "turn 1 is from 'wizard', wanted 'human'"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "0 turns"),
        ({"conversations": turns("<image>", "b")}, "1 <image> placeholders, but the record names 0 images"),
        ({"image": "x.png", "conversations": turns("a", "b")}, "0 <image> placeholders, but the record names 1 images"),
        ({"image": 3, "conversations": turns("a", "b")}, "image must be a file name or a list of them, got 3"),
        ({"image": [""], "conversations": turns("a", "b")}, "image must be a file name"),
        ({"conversations": turns("a", "\ud800")}, "lone surrogate"),
    ],
)
def test_bad_records(record, reason, tokenizer):
    with pytest.raises(BadRecord, match=reason):
        tokenize_record(record, tokenizer, TEMPLATE)


def test_leading_answer_is_dropped(tokenizer):
    conversation = [{"from": "gpt", "value": "hello"}, *turns("a", "b")]
    assert tokenize_record({"conversations": conversation}, tokenizer, TEMPLATE).ids == tokenize_prompt(["a"], tokenizer, TEMPLATE) + [
        *tokenizer.encode(" b"),
        tokenizer.eos_token_id,
    ]

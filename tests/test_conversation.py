"""A conversation turn by turn equals a single pass over all of it, and computes nothing twice."""

import io
import itertools
import runpy
import signal

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from htc_megatron.config import ConfigError
from htc_megatron.inference import Conversation, ask, load
from htc_megatron.inference.answer import message
from htc_megatron.weights.export import export
from tests.data_tiny import noise
from tests.hf_tiny import made
from tests.test_hf_export import ROOT, tool
from tests.test_hf_generate import TOLERANCE

VARIANTS = [
    dict(mask=mask, num_voco_tokens=run, image_sees=image_sees)
    for (mask, run), image_sees in itertools.product((("star", 1), ("full", 2), ("none", 0)), ("own", "prefix"))
] + [dict(text_sees="voco_on"), dict(fusion="parallel", num_voco_tokens=2)]
TURNS = [(2, "red <image> or <image> blue ?"), (0, "is it red ?"), (1, "what shape is in the image ?"), (0, "green")]
PICTURES = [noise(20, 13 + i).convert("RGB") for i in range(3)]


def exported(folder, **variant):
    reader, _ = made(folder, seed=3, **variant)
    export(reader, folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported model, and a picture beside it."""
    folder = tmp_path_factory.mktemp("chat")
    PICTURES[0].save(folder / "picture.png")
    return exported(folder)


class Tokens(BaseStreamer):
    """What generate() streams: the whole prompt, then the answer's tokens. after: called once that many have come."""

    def __init__(self, after: int = -1, call=lambda: None):
        self.prompt, self.answer, self.after, self.call = None, [], after, call

    def put(self, value):
        if self.prompt is None:
            self.prompt = value[0].tolist()
        else:
            self.answer += value.tolist()
            if len(self.answer) == self.after:
                self.call()

    def end(self):
        pass


class Scores(LogitsProcessor):
    """The logits of all generated tokens in turn, as the model gave them."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(scores[0].clone())
        return scores


def talk(conversation, **options):
    """All turns; what was streamed in each."""
    pictures, streamed = iter(PICTURES), []
    for images, text in TURNS:
        for _ in range(images):
            conversation.add(next(pictures))
        streamed.append(Tokens())
        answer = conversation.say(text, max_new_tokens=5, streamer=streamed[-1], **options)
        assert conversation.messages[-2:] == [message(text, images), {"role": "assistant", "content": answer}]
    return streamed


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_turns_equal_a_single_pass(tmp_path, variant):
    """The logits of all generated tokens are those of one uncached pass over the whole conversation."""
    model, processor = load(exported(tmp_path, **variant))
    conversation, scores = Conversation(model, processor), Scores()
    streamed = talk(conversation, logits_processor=LogitsProcessorList([scores]))
    logits = model(torch.tensor([conversation.ids]), **processor.image_processor.preprocess(PICTURES)).logits[0]
    seen = []
    for turn in streamed:
        first = len(turn.prompt)
        assert conversation.ids[: first + len(turn.answer)] == turn.prompt + turn.answer and turn.answer
        seen += range(first - 1, first - 1 + len(turn.answer))
    torch.testing.assert_close(torch.stack(scores.seen), logits[seen], atol=TOLERANCE, rtol=0)


def test_nothing_is_computed_twice(folder):
    """Each picture goes through the tower once, each token through the backbone once, and the cache holds no V_hy."""
    model, processor = load(folder)
    conversation, passes, seen = Conversation(model, processor), [], []
    model.model.register_forward_pre_hook(lambda _, given: passes.append(given[0].shape[1]))
    model.model.vision_tower.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    streamed = talk(conversation)
    assert sum(seen) == len(PICTURES)
    assert sum(passes) == len(streamed[-1].prompt) + len(streamed[-1].answer) - 1  # the last token is not fed back
    conversation.new()
    assert conversation.say(TURNS[1][1], 5) == ask(model, processor, [], TURNS[1][1], 5)


def test_turns_are_tokenised_as_in_training(folder):
    """Answers that are spelled as the tokenizer spells them give the ids of the whole conversation's text."""
    model, processor = load(folder)
    conversation, eos = Conversation(model, processor), processor.tokenizer.eos_token_id
    answer = [*processor.encode("red circle", add_special_tokens=False), eos]

    for images, text in TURNS[1:3]:
        for picture in PICTURES[:images]:
            conversation.add(picture)
        following = iter(answer)
        conversation.say(text, prefix_allowed_tokens_fn=lambda row, ids, following=following: [next(following)])
    assert conversation.ids == processor.encode(processor.apply_chat_template(conversation.messages))


def test_a_turn_that_cannot_be_leaves_the_conversation_as_it_was(folder):
    model, processor = load(folder)
    conversation, plain = Conversation(model, processor), Conversation(model, processor)
    for one in (conversation, plain):
        one.add(PICTURES[0])
        one.say("green", 5)
    kept = [*conversation.ids], [*conversation.messages]
    conversation.add(PICTURES[1])
    for question, sentence in (("<image> <image>", "has 2 <image>, but 1"), ("red " * 500, "but the model has 512; begin a new one")):
        with pytest.raises(ConfigError, match=sentence):
            conversation.say(question, 5)
        assert kept == (conversation.ids, conversation.messages)
    plain.add(PICTURES[1])
    assert conversation.say("red", 5) == plain.say("red", 5) and conversation.ids == plain.ids

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.say("red", 5, Tokens(2, fail))
    assert not conversation.ids and not conversation.messages
    with pytest.raises(ConfigError, match="changes earlier turns or does not end an answer"):
        processor.chat_template = "{{ messages | length }}"
        plain.say("red", 5)


def test_an_answer_ends_where_the_positions_do(folder):
    model, processor = load(folder)
    conversation, streamer = Conversation(model, processor), Tokens()
    conversation.add(PICTURES[0])
    conversation.say("red " * 370, 500, streamer, eos_token_id=None)
    assert len(streamer.prompt) + len(streamer.answer) + model.config.visual_per_image == 512 and len(streamer.answer) > 5


def test_an_interrupted_answer_is_cut_and_the_conversation_goes_on(folder):
    model, processor = load(folder)
    conversation, whole = Conversation(model, processor), Tokens()
    Conversation(model, processor).say("green", 6, whole)
    interruption = runpy.run_path(str(ROOT / "tools" / "chat.py"))["Interruption"]()
    for _ in range(2):
        conversation.new()
        with interruption.taken():
            cut = Tokens(2, lambda: signal.raise_signal(signal.SIGINT))
            conversation.say("green", 6, cut, stopping_criteria=StoppingCriteriaList([interruption]))
        assert cut.answer == whole.answer[:3] and conversation.ids == [*cut.prompt, *cut.answer, processor.tokenizer.eos_token_id]
    assert conversation.say("red", 3) and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def piped(monkeypatch, lines, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return tool("chat.py", *arguments)


def test_the_tool_talks_through_a_pipe(folder, monkeypatch):
    picture = folder.parent / "picture.png"
    done = piped(monkeypatch, f"green\n\n/image {picture}\nis it red ?\n/new\ngreen\n/quit\nred\n", folder, "--max-new-tokens", 5)
    model, processor = load(folder)
    conversation, wanted = Conversation(model, processor), []
    wanted.append(conversation.say("green", 5))
    conversation.add(PICTURES[0])
    wanted += [conversation.say("is it red ?", 5), wanted[0]]
    assert done.status == 0 and [line.strip() for line in done.out.splitlines()] == wanted
    drawn = [
        piped(monkeypatch, "green\nred", folder, "--max-new-tokens", 5, "--temperature", 2, "--top-p", 0.9, "--seed", seed).out
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_tool_takes_pictures_from_a_store(folder, monkeypatch, tmp_path):
    picture = folder.parent / "picture.png"
    assert tool("compress_images.py", folder, picture, "--store", tmp_path / "store").status == 0
    given = "is it red ?\ngreen", folder, "--image", picture, "--max-new-tokens", 5
    assert piped(monkeypatch, *given, "--store", tmp_path / "store").out == piped(monkeypatch, *given).out
    done = piped(monkeypatch, f"/image {folder / 'config.json'}", folder, "--store", tmp_path / "store")
    assert done.status == 2 and "config.json is not in the store" in done.error


@pytest.mark.parametrize(
    "lines, options, sentence",
    [
        ("/image absent.png", [], "picture absent.png"),
        ("/images", [], "there is no command /images; wanted /image PATH, /new or /quit"),
        ("<image> ?", [], "has 1 <image>, but 0 images"),
        ("", ["--top-p", 0.5], "--top-p is 0.5, but the likeliest token is taken"),
        ("", ["--temperature", 1, "--top-p", 0], "wanted at least 0, and above 0 up to 1"),
        ("", ["--max-new-tokens", 0], "--max-new-tokens is 0; wanted at least 1"),
        ("", ["--image", "absent.png"], "picture absent.png"),
    ],
)
def test_the_tool_refuses_in_one_sentence(folder, monkeypatch, lines, options, sentence):
    done = piped(monkeypatch, lines, folder, *options)
    assert done.status == 2 and sentence in done.error.splitlines()[-1]

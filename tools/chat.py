"""Talk with an exported model about pictures: `python tools/chat.py runs/quickstart/hf --image picture.png`.

A line is a question; its answer comes word by word. Commands:
  /image PATH   add a picture to the next question, in front of it or where it says "<image>"
  /new          forget everything said and shown
  /quit         end, as does the end of input
Ctrl-C ends an answer. Questions may come from a pipe; then what cannot be done ends the program.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from htc_megatron.config import ConfigError
from htc_megatron.inference import Conversation, ImageStore, load, read_image

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  lets input() edit a line and bring back earlier ones


class Interruption(StoppingCriteria):
    """Ends an answer behind the token at which Ctrl-C came, so that the conversation can go on."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.came, device=input_ids.device)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        self.came = False
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "came", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def lines(prompt: str) -> Iterator[str]:
    """What is typed, until the end of input, or Ctrl-C between answers."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input(prompt).strip()


def talk(conversation: Conversation, open_image: Callable[[str], Any], options: dict[str, Any]) -> None:
    """Read questions and commands, write answers. Raises ConfigError for what cannot be done, where nobody sits at a terminal."""
    at_terminal = sys.stdin.isatty()
    streamer = TextStreamer(conversation.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    interruption = Interruption()
    for line in lines("> " if at_terminal else ""):
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/new":
                conversation.new()
            elif command == "/image":
                conversation.add(open_image(rest.strip()))
            elif command.startswith("/"):
                raise ConfigError(f"there is no command {command}; wanted /image PATH, /new or /quit")
            elif line:
                with interruption.taken():
                    conversation.say(line, streamer=streamer, stopping_criteria=StoppingCriteriaList([interruption]), **options)
        except ConfigError as error:
            if not at_terminal:
                raise
            print(error, file=sys.stderr)
    if at_terminal:
        print()


def generation(max_new_tokens: int, temperature: float, top_p: float | None) -> dict[str, Any]:
    """generate's options. Raises ConfigError."""
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {max_new_tokens}; wanted at least 1")
    if temperature < 0 or (top_p is not None and not 0 < top_p <= 1):
        raise ConfigError(f"--temperature is {temperature:g} and --top-p {top_p}; wanted at least 0, and above 0 up to 1")
    if not temperature:
        if top_p is not None:
            raise ConfigError(f"--top-p is {top_p:g}, but the likeliest token is taken; wanted --temperature with it")
        return {"max_new_tokens": max_new_tokens}
    drawn = {"do_sample": True, "temperature": temperature, "top_p": 1.0 if top_p is None else top_p, "top_k": 0}
    return {"max_new_tokens": max_new_tokens} | drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="exported folder")
    parser.add_argument("--image", action="append", default=[], help="picture of the first question; give it again for several")
    parser.add_argument("--store", type=Path, help="folder of tools/compress_images.py, which has the pictures: they are not encoded again")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0: the likeliest token (default: %(default)s)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens that have this probability together (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    try:
        options = generation(a.max_new_tokens, a.temperature, a.top_p)
        model, processor = load(a.model, device=a.device)
        store = ImageStore(a.store, model, processor.image_processor) if a.store else None
        open_image = Path if store else read_image
        conversation = Conversation(model, processor, store)
        for path in a.image:
            conversation.add(open_image(path))
        torch.manual_seed(a.seed)
        talk(conversation, open_image, options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

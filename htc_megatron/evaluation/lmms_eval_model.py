"""An exported model as lmms-eval 0.7 sees one: its tasks ask, and their own code scores."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from htc_megatron.config import ConfigError
from htc_megatron.inference import answer, ask, likelihoods, load

MAX_NEW_TOKENS = 128  # where a task does not say


class Settings(NamedTuple):
    """Of generation, from a task's generation_kwargs; what is not named here is left out, as lmms-eval's own models do."""

    max_new_tokens: int
    sampling: tuple[tuple[str, Any], ...]
    until: tuple[str, ...]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Settings":
        if (beams := given.get("num_beams") or 1) > 1:
            raise ConfigError(f"num_beams is {beams}, wanted 1: questions that share an image's cache are answered without beams")
        sampling = {}
        if (given.get("temperature") or 0) > 0:
            sampling = {"do_sample": True} | {name: given[name] for name in ("temperature", "top_p", "top_k") if given.get(name)}
        until = given.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        return cls(given.get("max_new_tokens") or MAX_NEW_TOKENS, tuple(sampling.items()), until)

    def cut(self, text: str) -> str:
        for stop in self.until:
            text = text.split(stop)[0]
        return text.strip()


class HTCVLM(lmms):
    """pretrained: an exported folder. batch_size: requests taken together; those among them about one image compress it once.

    With `accelerate launch` every process answers its share on its own GPU.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 64,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = torch.device(device if device and device != "cuda" else cuda if torch.cuda.is_available() else "cpu")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size is {batch_size!r}, wanted a number of at least 1")
        self.batch_size = min(int(batch_size), max_batch_size or int(batch_size))
        self.model, self.processor = load(pretrained, dtype=dtype, device=str(self.device))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        texts = []
        for window, images, numbers in self._windows(requests):
            of_settings: dict[Settings, list[int]] = {}
            for place, request in enumerate(window):
                of_settings.setdefault(Settings.of(request.args[1]), []).append(place)
            made = [""] * len(window)
            for settings, places in of_settings.items():
                seen, blind = ([p for p in places if bool(numbers[p]) is want] for want in (True, False))
                asked = [(numbers[p], window[p].args[0]) for p in seen]
                options = dict(settings.sampling)
                given = answer(self.model, self.processor, images, asked, settings.max_new_tokens, self.batch_size, **options)
                if blind and options:
                    raise ConfigError(f"a question without an image is answered greedily: got {options}, wanted temperature 0")
                given += [ask(self.model, self.processor, [], window[p].args[0], settings.max_new_tokens) for p in blind]
                for place, text in zip(seen + blind, given, strict=True):
                    made[place] = settings.cut(text)
            texts += made
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """As `text`, (mean negative log-likelihood of the continuation's tokens, whether it is the greedy answer) of each request.

        The mean loss, and not the sum of logarithms, because lmms-eval's tasks take the smallest and its own models give this. Wrapped,
        because 0.7.3 makes a string of a bare pair, which its tasks then cannot read.
        """
        found = []
        for window, images, numbers in self._windows(requests):
            asked = []
            for request, of_request in zip(window, numbers, strict=True):
                context, continuation, doc = request.args[0], request.args[1], self._doc(request)
                asked.append((of_request, context, continuation(doc) if callable(continuation) else continuation))
            for likelihood in likelihoods(self.model, self.processor, images, asked, self.batch_size):
                found.append(GenerationResult((-likelihood.log / likelihood.tokens, likelihood.greedy)))
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise ConfigError(f"{len(requests)} requests are of several rounds, wanted tasks of one: HTC-VLM's plugin answers single questions")

    def _doc(self, request: Instance) -> dict:
        doc_id, task, split = request.args[3:6]
        return self.task_dict[task][split][doc_id]

    def _windows(self, requests: list[Instance]) -> Iterator[tuple[list[Instance], list[Image.Image], list[tuple[int, ...]]]]:
        """Requests in stretches, their pictures, equal ones once, and which of these each request has."""
        for first in tqdm(range(0, len(requests), self.batch_size), disable=self.rank != 0, desc="htc_vlm"):
            window = requests[first : first + self.batch_size]
            images: dict[bytes, Image.Image] = {}
            numbers: dict[bytes, int] = {}
            of_requests = []
            for request in window:
                keys = []
                for visual in request.args[2](self._doc(request)) or ():
                    if not isinstance(visual, Image.Image):
                        raise ConfigError(f"task {request.args[4]} shows a {type(visual).__name__}, wanted pictures alone")
                    picture = visual.convert("RGB")
                    keys.append(hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest())
                    images.setdefault(keys[-1], picture)
                    numbers.setdefault(keys[-1], len(numbers))
                of_requests.append(tuple(numbers[key] for key in keys))
            yield window, list(images.values()), of_requests

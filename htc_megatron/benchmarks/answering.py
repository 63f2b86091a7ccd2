"""What benchmarks of answers share: models of wanted sizes with random weights, and questions whose parts are timed."""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from htc_megatron.config import ConfigError
from htc_megatron.hf.configuration_htc_vlm import HTCVLMConfig
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration

MGVQ = {
    "full": {},
    "tiny": dict(
        widths=[16, 16], depths=[1, 1], decoder_depths=[1, 1], blocks=["res", "evit"], head_dim=8, latent_channels=8, groups=2,
        codebook_size=32,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of the models and the question. tower_layers: as published; LLaVA takes the features before the last."""

    hidden: int = 1024
    layers: int = 8
    heads: int = 16
    vocabulary: int = 32001
    tower_hidden: int = 1024
    tower_layers: int = 24
    tower_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    voco: int = 1
    prompt: int = 64
    answer: int = 16
    batch: int = 16


def add_sizes(command: argparse.ArgumentParser, *without: str) -> None:
    """An option for each of Sizes, and the discrete tokenizer's size."""
    for field in fields(Sizes):
        if field.name not in without:
            command.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default, help="(default: %(default)s)")
    command.add_argument("--mgvq", choices=MGVQ, default="full", help="size of the discrete tokenizer (default: the public one's)")


def sizes_of(args: argparse.Namespace) -> Sizes:
    """What `add_sizes` read. Raises ConfigError for a question or an answer that has no parts to time."""
    sizes = Sizes(**{field.name: getattr(args, field.name) for field in fields(Sizes) if field.name in args})
    if sizes.prompt < 2 or sizes.answer < 3:
        raise ConfigError(f"prompt and answer: got {sizes.prompt} and {sizes.answer} tokens, wanted at least 2 and 3")
    return sizes


@contextmanager
def sizes_refused() -> Iterator[None]:
    """Sizes that make no model raise ConfigError."""
    try:
        yield
    except (ValueError, StrictDataclassError) as error:
        raise ConfigError(f"these sizes make no model: {error}") from None


def text_config(sizes: Sizes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.hidden * 11 // 4,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def tower_sizes(sizes: Sizes) -> dict[str, int]:
    """Of CLIPVisionConfig, all but the number of layers."""
    return dict(
        hidden_size=sizes.tower_hidden, intermediate_size=4 * sizes.tower_hidden, num_attention_heads=sizes.tower_heads,
        image_size=sizes.image_size, patch_size=sizes.patch_size,
    )  # fmt: skip


def random_htc_vlm(sizes: Sizes, mgvq: str) -> HTCVLMForConditionalGeneration:
    """HTC-VLM with random weights; the placeholder is the last of the vocabulary. Raises ConfigError for sizes that make no model."""
    with sizes_refused():
        config = HTCVLMConfig(
            text_config=text_config(sizes),
            vision_config=CLIPVisionConfig(**tower_sizes(sizes), num_hidden_layers=sizes.tower_layers - 1),
            mgvq_config=dict(image_size=sizes.image_size) | MGVQ[mgvq],
            num_voco_tokens=sizes.voco,
            image_token_id=sizes.vocabulary - 1,
        )
        return HTCVLMForConditionalGeneration(config).eval().requires_grad_(False)


def noise_image(side: int, file: Path) -> Path:
    """A square picture of noise, as PNG."""
    Image.fromarray(torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy()).save(file)
    return file


class Clock(BaseStreamer):
    """When the prompt and each token of an answer came."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Asked:
    """Questions asked of a model again and again: `self()` returns seconds, and `parts` keeps what they were spent on.

    inputs: called in the time that is counted, for what generate() takes. named: functions that are timed in the run, by the object
    that has each and its name there. A part is seconds of one call: before (until the first pass over the prompt: loading, encoding and
    compressing; transformers runs LLaVA's tower there too), prefill, step (median over the steps of decoding), and those of `named`,
    which are within before. tokens: of the last answer.
    """

    def __init__(self, model: PreTrainedModel, inputs: Callable[[], dict[str, Tensor]], answer: int, named: dict[str, tuple[object, str]]):
        self.model, self.inputs, self.answer, self.named = model, inputs, answer, named
        self.parts: list[dict[str, float]] = []
        self.tokens: Tensor | None = None

    def __call__(self) -> float:
        spent = dict.fromkeys(self.named, 0.0)
        with ExitStack() as stack:
            for name, (owner, function) in self.named.items():
                stack.enter_context(self._timed(owner, function, name, spent))
            return self._ask(spent)

    @contextmanager
    def _timed(self, owner: object, function: str, name: str, spent: dict[str, float]) -> Iterator[None]:
        """Within it, seconds of owner.function are added to spent[name]."""
        original, own = getattr(owner, function), function in vars(owner)

        def timing(*given, **named):
            began = self._now()
            made = original(*given, **named)
            spent[name] += self._now() - began
            return made

        setattr(owner, function, timing)
        try:
            yield
        finally:
            if own:
                setattr(owner, function, original)
            else:
                delattr(owner, function)

    def _now(self) -> float:
        """When all that was asked of the model's device is done."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _ask(self, spent: dict[str, float]) -> float:
        clock = Clock()
        began = self._now()
        inputs = self.inputs()
        clock.times.clear()
        options = dict(max_new_tokens=self.answer, do_sample=False, eos_token_id=None, pad_token_id=0)
        if len(inputs["input_ids"]) == 1:  # transformers streams one row only
            options["streamer"] = clock
        made = self.model.generate(**inputs, **options)
        seconds = self._now() - began
        self.tokens = made[:, -self.answer :]
        if clock.times:
            steps = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
            before, prefill = clock.times[0] - began, clock.times[1] - clock.times[0]
            self.parts.append(spent | {"before": before, "prefill": prefill, "step": median(steps)})
        return seconds

    def part(self, name: str) -> float:
        """Median over the calls, without the first, which warms up."""
        return median(one[name] for one in self.parts[1:])

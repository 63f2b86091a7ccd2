"""A question about an image: transformers' uncompressed LLaVA beside HTC-VLM on an image that was compressed before.

Both have the same backbone, tower and projector, shared in memory; weights are random, and answers are greedy and of a fixed length.
Ours is as `htc_megatron.inference.load` gives it, on CPU with products by oneDNN. LLaVA runs as transformers gives it and, to tell what
is due to compression alone, once more with the same products.
Parts of an answer are timed inside the run that is counted: the tower by its hooks, prefill and steps of decoding by the streamer.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from htc_megatron.benchmarks.result import Result, Say, alternated, median_ratio
from htc_megatron.config import ConfigError
from htc_megatron.hf.configuration_htc_vlm import HTCVLMConfig
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.processing_htc_vlm import HTCVLMImageProcessor
from htc_megatron.inference.store import ImageStore, file_key
from htc_megatron.onednn import use_onednn
from htc_megatron.training.flops import peak_flops

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


def build(sizes: Sizes, mgvq: str) -> tuple[LlavaForConditionalGeneration, LlavaForConditionalGeneration, HTCVLMForConditionalGeneration]:
    """The peer; the peer with our products; and ours: three models that share the weights of backbone, tower and projector.

    Raises ConfigError for sizes that make no model.
    """
    try:
        text = LlamaConfig(
            vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.hidden * 11 // 4,
            num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads,
            max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        vision = dict(
            hidden_size=sizes.tower_hidden, intermediate_size=4 * sizes.tower_hidden, num_attention_heads=sizes.tower_heads,
            image_size=sizes.image_size, patch_size=sizes.patch_size,
        )  # fmt: skip
        token, patches = sizes.vocabulary - 1, (sizes.image_size // sizes.patch_size) ** 2
        published = CLIPVisionConfig(**vision, num_hidden_layers=sizes.tower_layers)
        uncompressed = LlavaConfig(vision_config=published, text_config=text, image_token_index=token, image_seq_length=patches)
        peer, same = (LlavaForConditionalGeneration(uncompressed).eval() for _ in range(2))
        config = HTCVLMConfig(
            text_config=peer.config.text_config,
            vision_config=CLIPVisionConfig(**vision, num_hidden_layers=sizes.tower_layers - 1),
            mgvq_config=dict(image_size=sizes.image_size) | MGVQ[mgvq],
            num_voco_tokens=sizes.voco,
            image_token_id=token,
        )
        ours = HTCVLMForConditionalGeneration(config).eval()
    except (ValueError, StrictDataclassError) as error:
        raise ConfigError(f"these sizes make no model: {error}") from None
    for model in (peer, same, ours):
        model.requires_grad_(False)
    weights = peer.state_dict()
    same.load_state_dict(weights, assign=True)
    projector = {"linear_1": "fc1", "linear_2": "fc2"}
    renamed = {name.replace("multi_modal_projector", "projector"): tensor for name, tensor in weights.items()}
    for theirs, mine in projector.items():
        renamed = {name.replace(f"projector.{theirs}.", f"projector.{mine}."): tensor for name, tensor in renamed.items()}
    own = ours.state_dict()
    ours.load_state_dict(own | {name: tensor for name, tensor in renamed.items() if name in own}, assign=True)
    return peer, use_onednn(same), use_onednn(ours)


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

    inputs: called in the time that is counted, for what generate() takes. named: parts that are timed by the modules they run in.
    A part is seconds of one call: before (until the first pass over the prompt: loading, encoding and compressing; transformers runs
    LLaVA's tower there too), prefill, step (median over the steps of decoding), and those of `named`, which are within before.
    tokens: of the last answer.
    """

    def __init__(self, model: PreTrainedModel, inputs: Callable[[], dict[str, Tensor]], answer: int, named: dict[str, nn.Module]):
        self.model, self.inputs, self.answer, self.named = model, inputs, answer, named
        self.parts: list[dict[str, float]] = []
        self.tokens: Tensor | None = None

    def __call__(self) -> float:
        spent = dict.fromkeys(self.named, 0.0)
        handles = []
        for name, module in self.named.items():
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: spent.update({name: spent[name] - time.perf_counter()})),
                module.register_forward_hook(lambda *_, name=name: spent.update({name: spent[name] + time.perf_counter()})),
            ]
        clock = Clock()
        began = time.perf_counter()
        inputs = self.inputs()
        clock.times.clear()
        options = dict(max_new_tokens=self.answer, do_sample=False, eos_token_id=None, pad_token_id=0)
        if len(inputs["input_ids"]) == 1:  # transformers streams one row only
            options["streamer"] = clock
        made = self.model.generate(**inputs, **options)
        seconds = time.perf_counter() - began
        for handle in handles:
            handle.remove()
        self.tokens = made[:, -self.answer :]
        if clock.times:
            steps = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
            before, prefill = clock.times[0] - began, clock.times[1] - clock.times[0]
            self.parts.append(spent | {"before": before, "prefill": prefill, "step": median(steps)})
        return seconds

    def part(self, name: str) -> float:
        """Median over the calls, without the first, which warms up."""
        return median(one[name] for one in self.parts[1:])


def step_bytes(model: PreTrainedModel) -> list[Tensor]:
    """The weights that a step of decoding reads: all of the backbone's but the embedding, and the output layer."""
    backbone = [tensor for name, tensor in model.model.language_model.named_parameters() if not name.startswith("embed_tokens")]
    return [*backbone, model.lm_head.weight]


def read(tensors: list[Tensor]) -> float:
    """Seconds to read tensors once, by sums."""
    began = time.perf_counter()
    for tensor in tensors:
        tensor.sum()
    return time.perf_counter() - began


@torch.no_grad()
def measure_answers(sizes: Sizes, mgvq: str, rounds: int, folder: Path, say: Say) -> dict[str, Any]:
    """Medians over `rounds`; the store is written under `folder`. Seconds, but for what says otherwise.

    uncompressed: the peer's answer. same_products: the peer's with our products. cached: ours to a question on a stored image,
    loading included. first: ours with the image compressed on the way, MGVQ's codes being ready as prepared data has them.
    first_with_mgvq: codes made on the way too.
    batched, uncompressed_batched: a question of `batch` together, on as many images; the peer's measured once.
    parts: of all that are asked alone. step_bytes: of the weights that a step reads. kv_bytes: of an image's keys and values.
    floor_s: of the cached question: its products at this machine's rate of products, and its steps at the rate of a plain read.
    """
    torch.manual_seed(0)
    say("making the models")
    peer, same, ours = build(sizes, mgvq)
    config, token = ours.config, sizes.vocabulary - 1
    if sizes.prompt < 2 or sizes.answer < 3:
        raise ConfigError(f"prompt and answer: got {sizes.prompt} and {sizes.answer} tokens, wanted at least 2 and 3")
    text = torch.randint(3, token, (sizes.batch, sizes.prompt))
    half = sizes.prompt // 2

    def ids(rows: int, run: int) -> Tensor:
        return torch.cat([text[:rows, :half], torch.full((rows, run), token), text[:rows, half:]], 1)

    say("compressing the images")
    processor = HTCVLMImageProcessor(sizes.image_size, sizes.image_size)
    files = [folder / f"{number}.png" for number in range(sizes.batch)]
    for file in files:
        noise = torch.randint(0, 256, (sizes.image_size, sizes.image_size, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(file)
    pixels = processor.preprocess(files)
    codes = ours.model.mgvq.encode(pixels["mgvq_pixel_values"][:1])
    rest = torch.randint(0, config.mgvq_config.get("codebook_size", 16384) // ours.model.mgvq.groups, (sizes.batch, *codes.shape[1:]))
    codes = torch.cat([codes, rest[1:].to(codes.dtype)])
    store = ImageStore(folder / "store", ours, processor, create=True)
    kept = [ours.compress_images(pixel_values=pixels["pixel_values"][i : i + 1], mgvq_codes=codes[i : i + 1]) for i in range(sizes.batch)]
    store.write([file_key(file) for file in files], torch.cat(kept))

    def uncompressed(rows: int) -> dict[str, Tensor]:
        found = ids(rows, peer.config.image_seq_length)
        return {"input_ids": found, "attention_mask": torch.ones_like(found), "pixel_values": pixels["pixel_values"][:rows]}

    def compressed(rows: int, **images: Tensor) -> dict[str, Tensor]:
        found = ids(rows, sizes.voco)
        return {"input_ids": found, "attention_mask": torch.ones_like(found), **images}

    one, code = pixels["pixel_values"][:1], codes[:1]
    tower = {"tower": peer.model.vision_tower}
    our_tower = {"tower": ours.model.vision_tower}
    asked = {
        "uncompressed": Asked(peer, lambda: uncompressed(1), sizes.answer, tower),
        "same_products": Asked(same, lambda: uncompressed(1), sizes.answer, {"tower": same.model.vision_tower}),
        "cached": Asked(ours, lambda: compressed(1, image_keys_values=store.load(files[:1])), sizes.answer, {}),
        "first": Asked(ours, lambda: compressed(1, pixel_values=one, mgvq_codes=code), sizes.answer, our_tower),
        "first_with_mgvq": Asked(
            ours,
            lambda: compressed(1, pixel_values=one, mgvq_pixel_values=pixels["mgvq_pixel_values"][:1]),
            sizes.answer,
            our_tower | {"mgvq": ours.model.mgvq.encoder},
        ),
        "batched": Asked(ours, lambda: compressed(sizes.batch, image_keys_values=store.load(files)), sizes.answer, {}),
    }
    weights = step_bytes(ours)
    runs = alternated({**asked, "read": lambda: read(weights)}, rounds, say)
    say(f"{sizes.batch} uncompressed questions together")
    together = Asked(peer, lambda: uncompressed(sizes.batch), sizes.answer, {})() / sizes.batch
    runs["batched"] = [seconds / sizes.batch for seconds in runs["batched"]]

    features = ours.get_image_features(pixel_values=one, mgvq_codes=code)
    visual = peer.model.language_model(inputs_embeds=features, use_cache=True).past_key_values
    nbytes = sum(weight.nbytes for weight in weights)
    seconds = {name: median(found) for name, found in runs.items() if name != "read"} | {"uncompressed_batched": together}
    rate = nbytes / median(runs["read"])
    products = 2 * (sizes.prompt + sizes.voco) * sum(w.numel() for w in weights[:-1]) + 2 * weights[-1].numel()
    floor = products / peak_flops(torch.device("cpu"), torch.float32) + (sizes.answer - 1) * nbytes / rate
    return {
        "sizes": {field.name: getattr(sizes, field.name) for field in fields(sizes)} | {"mgvq": mgvq},
        "visual_tokens": {"uncompressed": peer.config.image_seq_length, "ours": features.shape[1]},
        "seconds": seconds,
        "parts": {name: {part: work.part(part) for part in work.parts[0]} for name, work in asked.items() if work.parts},
        "step_bytes": nbytes,
        "read_bytes_per_s": rate,
        "step_bytes_per_s": {name: nbytes / asked[name].part("step") for name in ("uncompressed", "cached")},
        "floor_s": floor,
        "kv_bytes": {
            "uncompressed": sum(part.nbytes for layer in visual.layers for part in (layer.keys, layer.values)),
            "stored": store.load(files[:1]).nbytes,
        },
        "same_answer": all(torch.equal(asked["cached"].tokens, asked[name].tokens) for name in ("first", "first_with_mgvq")),
        "rounds": runs,
    }


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """By the names in the README; `uncompressed` is the peer at the same number of questions but for uncompressed_over_ours_batched."""
    runs, seconds, kv = found["rounds"], found["seconds"], found["kv_bytes"]
    return {
        "uncompressed_over_ours": median_ratio(runs["uncompressed"], runs["cached"]),
        "uncompressed_same_products_over_ours": median_ratio(runs["same_products"], runs["cached"]),
        "uncompressed_over_ours_batched": median_ratio(runs["uncompressed"], runs["batched"]),
        "uncompressed_batched_over_ours_batched": seconds["uncompressed_batched"] / seconds["batched"],
        "first_question_over_uncompressed": median_ratio(runs["first"], runs["uncompressed"]),
        "first_question_with_mgvq_over_uncompressed": median_ratio(runs["first_with_mgvq"], runs["uncompressed"]),
        "kv_uncompressed_over_ours": kv["uncompressed"] / kv["stored"],
        "cached_over_floor": seconds["cached"] / found["floor_s"],
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    sizes, seconds, parts, kv = found["sizes"], found["seconds"], found["parts"], found["kv_bytes"]
    names = ("uncompressed", "same_products", "cached", "first", "first_with_mgvq")
    peer, same, cached, first, whole = (parts[name] for name in names)
    rate, batch = found["step_bytes_per_s"], sizes["batch"]

    def shown(value: float) -> str:
        return f"{value * 1e3:,.1f} ms"

    steps = f"{sizes['answer'] - 1} steps of decoding, each"
    return [
        ("uncompressed LLaVA, a question", shown(seconds["uncompressed"])),
        ("  tower", shown(peer["tower"])),
        ("  prefill", shown(peer["prefill"])),
        (f"  {steps}", shown(peer["step"])),
        ("uncompressed LLaVA with our products, a question", shown(seconds["same_products"])),
        ("  tower", shown(same["tower"])),
        ("  prefill", shown(same["prefill"])),
        (f"  {steps}", shown(same["step"])),
        ("ours, a question on a cached image", shown(seconds["cached"])),
        ("  loading from the store", shown(cached["before"])),
        ("  prefill", shown(cached["prefill"])),
        (f"  {steps}", shown(cached["step"])),
        ("ours, the first question, codes ready", shown(seconds["first"])),
        ("  tower", shown(first["tower"])),
        ("  the rest of compressing", shown(first["before"] - first["tower"])),
        ("ours, the first question, MGVQ on the way", shown(seconds["first_with_mgvq"])),
        ("  MGVQ's encoder", shown(whole["mgvq"])),
        (f"ours, {batch} questions together on {batch} images, each", shown(seconds["batched"])),
        (f"uncompressed, {batch} together, each (one run)", shown(seconds["uncompressed_batched"])),
        ("weights that a step reads", f"{found['step_bytes'] / 1e6:,.1f} MB"),
        ("  read by a sum", f"{found['read_bytes_per_s'] / 1e9:.1f} GB/s"),
        ("  by a step, uncompressed and ours", f"{rate['uncompressed'] / 1e9:.1f} and {rate['cached'] / 1e9:.1f} GB/s"),
        ("floor of the cached question", shown(found["floor_s"])),
        ("an image's keys and values, uncompressed and stored", f"{kv['uncompressed']:,} and {kv['stored']:,} bytes"),
    ]


def add_arguments(command: argparse.ArgumentParser) -> None:
    for field in fields(Sizes):
        command.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default, help="(default: %(default)s)")
    command.add_argument("--mgvq", choices=MGVQ, default="full", help="size of the discrete tokenizer (default: the public one's)")
    command.add_argument("--rounds", type=int, default=5, help="figures are medians over them (default: %(default)s)")


def run(args: argparse.Namespace, say: Say) -> Result:
    """The figures of `measure_answers`. Raises ConfigError."""
    sizes = Sizes(**{field.name: getattr(args, field.name) for field in fields(Sizes)})
    with tempfile.TemporaryDirectory(prefix="benchmark_generate_") as folder:
        found = measure_answers(sizes, args.mgvq, args.rounds, Path(folder), say)
    return Result(rows(found), ratios(found), found)

"""A question about an image: transformers' uncompressed LLaVA beside HTC-VLM on an image that was compressed before.

Both have the same backbone, tower and projector, shared in memory; weights are random, and answers are greedy and of a fixed length.
Ours is as `htc_megatron.inference.load` gives it, on CPU with products by oneDNN. LLaVA runs as transformers gives it and, to tell what
is due to compression alone, once more with the same products.
Parts of an answer are timed inside the run that is counted: the tower where it is called, prefill and steps of decoding by the streamer.
"""

import argparse
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from htc_megatron.benchmarks.answering import (
    Asked,
    Sizes,
    add_sizes,
    noise_image,
    random_htc_vlm,
    sizes_of,
    sizes_refused,
    text_config,
    tower_sizes,
)
from htc_megatron.benchmarks.result import Result, Say, alternated, median_ratio
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.processing_htc_vlm import HTCVLMImageProcessor
from htc_megatron.inference.answer import made_ready
from htc_megatron.inference.onednn import use_onednn
from htc_megatron.inference.store import ImageStore, file_key
from htc_megatron.training.flops import peak_flops


def build(sizes: Sizes, mgvq: str) -> tuple[LlavaForConditionalGeneration, LlavaForConditionalGeneration, HTCVLMForConditionalGeneration]:
    """The peer; the peer with our products; and ours: three models that share the weights of backbone, tower and projector.

    Raises ConfigError for sizes that make no model.
    """
    with sizes_refused():
        uncompressed = LlavaConfig(
            vision_config=CLIPVisionConfig(**tower_sizes(sizes), num_hidden_layers=sizes.tower_layers),
            text_config=text_config(sizes),
            image_token_index=sizes.vocabulary - 1,
            image_seq_length=(sizes.image_size // sizes.patch_size) ** 2,
        )
        peer, same = (LlavaForConditionalGeneration(uncompressed).eval().requires_grad_(False) for _ in range(2))
    ours = random_htc_vlm(sizes, mgvq)
    weights = peer.state_dict()
    same.load_state_dict(weights, assign=True)
    projector = {"linear_1": "fc1", "linear_2": "fc2"}
    renamed = {name.replace("multi_modal_projector", "projector"): tensor for name, tensor in weights.items()}
    for theirs, mine in projector.items():
        renamed = {name.replace(f"projector.{theirs}.", f"projector.{mine}."): tensor for name, tensor in renamed.items()}
    own = ours.state_dict()
    ours.load_state_dict(own | {name: tensor for name, tensor in renamed.items() if name in own}, assign=True)
    return peer, use_onednn(same), made_ready(ours)  # freed memory stays for all three: they share a process


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
    text = torch.randint(3, token, (sizes.batch, sizes.prompt))
    half = sizes.prompt // 2

    def ids(rows: int, run: int) -> Tensor:
        return torch.cat([text[:rows, :half], torch.full((rows, run), token), text[:rows, half:]], 1)

    say("compressing the images")
    processor = HTCVLMImageProcessor(sizes.image_size, sizes.image_size)
    files = [noise_image(sizes.image_size, folder / f"{number}.png") for number in range(sizes.batch)]
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
    towers = [{"tower": (model.model.vision_tower, "forward")} for model in (peer, same, ours)]
    asked = {
        "uncompressed": Asked(peer, lambda: uncompressed(1), sizes.answer, towers[0]),
        "same_products": Asked(same, lambda: uncompressed(1), sizes.answer, towers[1]),
        "cached": Asked(ours, lambda: compressed(1, image_keys_values=store.load(files[:1])), sizes.answer, {}),
        "first": Asked(ours, lambda: compressed(1, pixel_values=one, mgvq_codes=code), sizes.answer, towers[2]),
        "first_with_mgvq": Asked(
            ours,
            lambda: compressed(1, pixel_values=one, mgvq_pixel_values=pixels["mgvq_pixel_values"][:1]),
            sizes.answer,
            towers[2] | {"mgvq": (ours.model.mgvq.encoder, "forward")},
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
    add_sizes(command)
    command.add_argument("--rounds", type=int, default=5, help="figures are medians over them (default: %(default)s)")


def run(args: argparse.Namespace, say: Say) -> Result:
    """The figures of `measure_answers`. Raises ConfigError."""
    sizes = sizes_of(args)
    with tempfile.TemporaryDirectory(prefix="benchmark_generate_") as folder:
        found = measure_answers(sizes, args.mgvq, args.rounds, Path(folder), say)
    return Result(rows(found), ratios(found), found)

"""What a question about an image costs HTC-VLM, part by part: from the picture's file, with MGVQ's codes ready, and with the image cached.

Of an exported model, or of random weights of wanted sizes. Parts are timed inside the run that is counted: what happens to the image
where its functions are called, prefill and steps of decoding by the streamer. Answers are greedy and of a fixed length.
"""

import argparse
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from htc_megatron.benchmarks.answering import Asked, Sizes, add_sizes, noise_image, random_htc_vlm, sizes_of
from htc_megatron.benchmarks.result import Result, Say, alternated, median_ratio
from htc_megatron.config import ConfigError
from htc_megatron.hf import modeling_htc_vlm
from htc_megatron.hf.image_htc_vlm import why_not_alone
from htc_megatron.hf.modeling_htc_vlm import HTCVLMForConditionalGeneration
from htc_megatron.hf.processing_htc_vlm import HTCVLMImageProcessor
from htc_megatron.inference import ImageStore, load, read_image
from htc_megatron.inference.answer import made_ready
from htc_megatron.inference.store import file_key

TITLES = {
    "pixels": "from the picture's file",
    "codes": "codes ready",
    "cached": "image cached",
    "prepare": "preparing the pixels",
    "mgvq": "MGVQ's encoder and quantiser",
    "tower": "CLIP tower",
    "resampler": "Q-Former",
    "projector": "projector of the patches",
    "anchors": "projector of the anchors",
    "compress": "compression by the backbone",
    "load": "loading from the store",
    "other": "other work before the prefill",
    "prefill": "prefill",
    "step": "a step of decoding",
}


def ways(
    model: HTCVLMForConditionalGeneration, processor: HTCVLMImageProcessor, image: Path, prompt: int, answer: int, folder: Path
) -> dict[str, Asked]:
    """The question asked in every way that the model has; a store for the image is made under `folder`.

    pixels; codes, where there is MGVQ; cached, where an image can be computed by itself. Where it cannot, the prefill compresses it.
    """
    config, inner = model.config, model.model
    text = torch.randint(3, config.image_token_id, (1, prompt))
    run = torch.full((1, config.image_seq_length), config.image_token_id)
    ids = torch.cat([text[:, : prompt // 2], run, text[:, prompt // 2 :]], 1).to(model.device)
    question = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def prepared(by: HTCVLMImageProcessor) -> dict[str, Tensor]:
        return {name: pixels.to(model.device) for name, pixels in by.preprocess([image]).items()}

    encoding = {}
    if config.channels != "discrete":
        resampler = {"resampler": (inner.resampler, "forward")} if config.resampler == "qformer" else {}
        encoding |= {"tower": (inner.vision_tower, "forward")} | resampler | {"projector": (inner.projector, "forward")}
    if config.anchors_per_image:
        encoding["anchors"] = (inner.anchors, "forward")
    alone = not why_not_alone(config)
    if alone:
        encoding["compress"] = (modeling_htc_vlm, "compress_images")
    quantised = {"mgvq": (inner.mgvq, "encode")} if config.has_mgvq else {}
    parts = {"prepare": (processor, "preprocess")} | quantised | encoding
    found = {"pixels": Asked(model, lambda: question | prepared(processor), answer, parts)}
    if quantised:
        codes = inner.mgvq.encode(prepared(processor)["mgvq_pixel_values"])
        tower_only = HTCVLMImageProcessor(processor.image_size, channels="continuous")
        sees = config.channels != "discrete"

        def with_codes() -> dict[str, Tensor]:
            return question | {"mgvq_codes": codes} | (prepared(tower_only) if sees else {})

        found["codes"] = Asked(model, with_codes, answer, ({"prepare": (tower_only, "preprocess")} if sees else {}) | encoding)
    if alone:
        store = ImageStore(folder / "store", model, processor, create=True)
        store.write([file_key(image)], model.compress_images(**prepared(processor)))
        found["cached"] = Asked(model, lambda: question | {"image_keys_values": store.load([image])}, answer, {"load": (store, "load")})
    return found


def parts_of(way: Asked, alone: bool) -> dict[str, float]:
    """Median seconds of each part; `other` is what is before the prefill and in no part.

    alone: images are computed by themselves. Without that they are encoded within the first pass, whose rest is then the prefill.
    """
    counted = way.parts[1:]  # the first warms up
    first_pass = [] if alone else [name for name in way.named if name != "prepare"]
    before = [name for name in way.named if name not in first_pass]
    rest = {"other": ("before", before), "prefill": ("prefill", first_pass)}
    found = {name: way.part(name) for name in way.named}
    found |= {part: median(one[whole] - sum(one[name] for name in names) for one in counted) for part, (whole, names) in rest.items()}
    return found | {"step": way.part("step")}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--export", type=Path, metavar="FOLDER", help="exported model; the sizes of models are not used then")
    command.add_argument("--image", type=Path, metavar="FILE", help="picture (default: noise of the tower's size)")
    command.add_argument("--device", default="cpu")
    add_sizes(command, "batch")
    command.add_argument("--rounds", type=int, default=5, help="figures are medians over them (default: %(default)s)")


def loaded(args: argparse.Namespace, sizes: Sizes) -> tuple[HTCVLMForConditionalGeneration, HTCVLMImageProcessor]:
    """The exported model, or one of random weights. Raises ConfigError, also where sizes are given beside an export."""
    if args.export:
        given = [field.name for field in fields(Sizes) if getattr(sizes, field.name) != field.default]
        if others := [name for name in given if name not in ("prompt", "answer")]:
            raise ConfigError(f"--{others[0].replace('_', '-')} is given beside --export, whose model has its own; wanted one of them")
        model, processor = load(args.export, device=args.device)
        return model.requires_grad_(False), processor.image_processor
    torch.manual_seed(0)
    model = made_ready(random_htc_vlm(sizes, args.mgvq).to(args.device))
    return model, HTCVLMImageProcessor(sizes.image_size, sizes.image_size)


@torch.no_grad()
def run(args: argparse.Namespace, say: Say) -> Result:
    """Seconds by way and part. Raises ConfigError."""
    sizes = sizes_of(args)
    if args.image:
        read_image(args.image)
    say("making the model")
    model, processor = loaded(args, sizes)
    with tempfile.TemporaryDirectory(prefix="benchmark_latency_") as folder:
        image = args.image or noise_image(processor.image_size, Path(folder) / "noise.png")
        asked = ways(model, processor, image, sizes.prompt, sizes.answer, Path(folder))
        rounds = alternated(asked, args.rounds, say)
    seconds = {name: median(several) for name, several in rounds.items()}
    parts = {name: parts_of(way, "cached" in asked) for name, way in asked.items()}
    rows = []
    for name, found in parts.items():
        rows.append((f"a question, {TITLES[name]}", f"{seconds[name] * 1e3:,.1f} ms"))
        rows += [(f"  {TITLES[part]}", f"{value * 1e3:,.1f} ms") for part, value in found.items()]
    others = [name for name in asked if name != "cached"] if "cached" in asked else []
    ratios = {f"{name}_over_cached": median_ratio(rounds[name], rounds["cached"]) for name in others}
    of = {"export": str(args.export)} if args.export else asdict(sizes) | {"mgvq": args.mgvq}
    figures = {
        "sizes": of | {"prompt": sizes.prompt, "answer": sizes.answer},
        "device": str(model.device),
        "visual_tokens": model.config.visual_per_image,
        "seconds": seconds,
        "parts": parts,
        "same_answer": all(torch.equal(way.tokens, asked["pixels"].tokens) for way in asked.values()),
        "rounds": rounds,
    }
    return Result(rows, ratios, figures)

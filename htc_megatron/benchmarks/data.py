"""What data costs: preparing images beside the encoder's own bound, the loader alone, how long training waits for it, and what a
cache of a frozen tower's features spares."""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from htc_megatron.benchmarks.result import Result, Say, alternated, median_ratio
from htc_megatron.config import BackboneConfig, DataConfig, MethodConfig, MGVQConfig, ModelConfig, RunConfig, TrainingConfig, VisionConfig
from htc_megatron.config_io import check, load_zero
from htc_megatron.data.conversation import Template
from htc_megatron.data.loader import DataLoader
from htc_megatron.data.prepare import CodeEncoder, Preparation, Work, prepare
from htc_megatron.data.tokenizer import Tokenizer, load_tokenizer
from htc_megatron.evaluation.easy_vqa import train_tokenizer
from htc_megatron.model.mgvq import build_mgvq, mgvq_fingerprint
from htc_megatron.parallel import groups as process_groups
from htc_megatron.parallel.groups import Groups
from htc_megatron.training.build import build_engine
from htc_megatron.training.flops import peak_flops
from htc_megatron.training.step import train_step
from htc_megatron.training.tower_features import TowerFeatures

# The quick start's MGVQ and pictures, and the public MGVQ with pictures of a photograph's size
MGVQS = {
    "small": MGVQConfig(64, (16, 32, 64), (1, 1, 1), (1, 1, 1), ("res", "res", "evit"), 16, 16, 4, 1024),
    "full": MGVQConfig(),
}
PICTURES = {"small": (64, 64, "png"), "full": (640, 480, "jpg")}
WORDS = (
    "what",
    "colour",
    "is",
    "the",
    "shape",
    "in",
    "this",
    "picture",
    "a",
    "circle",
    "or",
    "triangle",
    "red",
    "blue",
    "grey",
    "yes",
    "no",
)


def write_pictures(folder: Path, count: int, width: int, height: int, kind: str) -> tuple[Path, Path, Tokenizer]:
    """`count` pictures, smooth ones with some noise as photographs are, with two conversations each of 10 to 60 words.

    Returns (LLaVA JSON, image folder, a tokenizer of the conversations' words).
    """
    images = folder / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    records = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        noise = generator.integers(-8, 9, (height, width, 3))
        Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(images / f"{number}.{kind}")
        for turn in range(2):
            question, answer = (" ".join(generator.choice(WORDS, generator.integers(5, 31))) for _ in range(2))
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            records.append({"id": f"{number}-{turn}", "image": f"{number}.{kind}", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    train_tokenizer(records, folder / "tokenizer.model", 300)
    return folder / "data.json", images, load_tokenizer(folder / "tokenizer.model")


def encoder_flops(encoder: CodeEncoder) -> float:
    """Operations of encoding one image, counted as the products run; a multiply-add is two."""
    size, counter = encoder.model.image_size, FlopCounterMode(display=False)
    with counter:
        encoder.encode([torch.zeros(3, size, size)] * encoder.batch_size)
    return counter.get_total_flops() / encoder.batch_size


def measure_preparing(folder: Path, mgvq: MGVQConfig, picture: tuple[int, int, str], count: int, batch_size: int) -> dict[str, Any]:
    """Prepare `count` new pictures into folder/out.

    images_per_second: over the whole time, tokenising and writing included. bound: images a second at which the encoder's
    operations alone would take a matrix product's time on the same threads, measured before and after. seconds: of each kind of
    work; encoding runs in a thread beside the others, wait is for it.
    """
    data, images, tokenizer = write_pictures(folder, count, *picture)
    torch.manual_seed(0)
    model = build_mgvq(mgvq, encoder_only=True).eval().requires_grad_(False)
    encoder, work = CodeEncoder(model, mgvq_fingerprint(model), batch_size), Work()
    flops, device = encoder_flops(encoder), torch.device("cpu")
    peak = peak_flops(device, torch.float32)
    prepare(Preparation(data, images, folder / "out", tokenizer, Template(""), encoder, progress=False), work)
    peak = max(peak, peak_flops(device, torch.float32))
    return {
        "images": work.encoded,
        "seconds": work.seconds,
        "images_per_second": work.images_per_second,
        "encoder_images_per_second": work.encoded / work.seconds["encode"],
        "encoder_flops": flops,
        "peak_flops": peak,
        "bound_images_per_second": peak / flops,
        "rate_over_bound": work.images_per_second * flops / peak,
    }


def run_config(folder: Path, mgvq: MGVQConfig, tokenizer: Tokenizer, workers: int) -> RunConfig:
    """The quick start's model on folder/out, with a frozen tower. Batches of 6 rows."""
    size = 8 * (mgvq.image_size // 8)
    return RunConfig(
        model=ModelConfig(
            backbone=BackboneConfig(4, 96, 256, 4, 4, tokenizer.vocab_size),
            vision=VisionConfig(size, 8, 96, 256, 2, 4),
            mgvq=mgvq,
            method=MethodConfig(anchor_hidden_size=256, voco_token_id=tokenizer.voco_token_id),
        ),
        data=DataConfig(train=str(folder / "out"), num_workers=workers, feature_cache=str(folder / "features")),
        training=TrainingConfig(micro_batch_size=6, global_batch_size=6, seq_length=512, precision="fp32", freeze=("vision",)),
        output_dir=str(folder / "run"),
    )


def measure_loading(config: RunConfig, steps: int) -> dict[str, float]:
    """The loader with nothing to wait for it: samples, tokens and decoded images a second over `steps` steps."""
    loader = DataLoader(config, config.data.train, 0, 1, needs_pixels=True)
    samples = tokens = images = 0
    try:
        next(loader)
        began = time.perf_counter()
        for _ in range(steps):
            for batch in next(loader):
                spans = batch.layout.samples
                samples, images = samples + len(spans), images + batch.layout.num_images
                tokens += int((spans[:, 2] - spans[:, 1]).sum())
        seconds = time.perf_counter() - began
    finally:
        loader.close()
    found = {"samples": samples, "tokens": tokens, "images": images, "seconds": seconds, "padding_share": loader.padding_share}
    return found | {f"{name}_per_second": found[name] / seconds for name in ("samples", "tokens", "images")}


def measure_training(config: RunConfig, groups: Groups, steps: int, rounds: int, say: Say) -> dict[str, Any]:
    """A training of `steps` steps: wait_share is of the time since its first. Then steps on the same samples with their features
    computed and with their features read, in turn; loading is not in their seconds."""
    engine = build_engine(config, load_zero(config.zero), groups)
    features = TowerFeatures(engine, config, groups)
    place = (config.data.train, 0, 1, True)
    try:
        loader = DataLoader(config, *place)
        for _ in range(steps):
            train_step(engine, next(loader), config.optimizer.lr)
        wait_share, wait_seconds = loader.wait_share, loader.wait_seconds
        loader.close()

        def first_batches(cached: bool) -> list:
            loader = DataLoader(config, *place, cache=features.cache if cached else None)
            try:
                return next(loader)
            finally:
                loader.close()

        def timed(batches: list) -> float:
            began = time.perf_counter()
            train_step(engine, batches, config.optimizer.lr)
            return time.perf_counter() - began

        fill = first_batches(cached=True)
        features.agree(fill)
        train_step(engine, fill, config.optimizer.lr)
        features.keep(fill)
        features.totals()  # waits for the writing
        pixels, known = first_batches(cached=False), first_batches(cached=True)
        features.agree(known)
        left = sum(batch.num_tower_images for batch in known)
        found = alternated({"tower": lambda: timed(pixels), "cache": lambda: timed(known)}, rounds, say)
    finally:
        features.close()
        engine.destroy()
    images = sum(batch.layout.num_images for batch in pixels)
    ratio = median_ratio(found["tower"], found["cache"])
    return {"wait_share": wait_share, "wait_s": wait_seconds, "step_images": images, "tower_images": left, "step_s": found} | {
        "tower_over_cache": ratio
    }


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", type=int, default=1000, help="to prepare (default: %(default)s)")
    command.add_argument(
        "--mgvq", choices=tuple(MGVQS), default="small", help="the quick start's, or the public one's sizes; then no training"
    )
    command.add_argument("--batch-size", type=int, default=16, help="images that MGVQ encodes together (default: %(default)s)")
    command.add_argument("--workers", type=int, default=1, help="the loader's threads (default: %(default)s)")
    command.add_argument("--steps", type=int, default=40, help="of loading, and of the training that may wait (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=7, help="of steps with and without the tower (default: %(default)s)")
    command.add_argument("--folder", type=Path, help="where everything is written and removed again (default: TMPDIR)")


def run(args: argparse.Namespace, say: Say) -> Result:
    """All figures; with the public MGVQ those of preparing alone, which take a minute an image on two cores."""
    folder = Path(tempfile.mkdtemp(prefix="benchmark_data_", dir=args.folder))
    mgvq = MGVQS[args.mgvq]
    try:
        say(f"preparing {args.images} images")
        preparing = measure_preparing(folder, mgvq, PICTURES[args.mgvq], args.images, min(args.batch_size, args.images))
        rows, ratios = _preparing_rows(preparing), {"rate_over_bound": preparing["rate_over_bound"]}
        figures: dict[str, Any] = {"mgvq": args.mgvq, "preparing": preparing}
        if args.mgvq == "small":
            config = run_config(folder, mgvq, load_tokenizer(folder / "tokenizer.model"), args.workers)
            check(config, 1)
            say(f"loading {args.steps} steps")
            loading = measure_loading(config, args.steps)
            groups = process_groups.initialise(config.parallel, config.training.seed)
            try:
                say(f"training {args.steps} steps")
                training = measure_training(config, groups, args.steps, args.rounds, say)
            finally:
                process_groups.destroy()
            rows += _loading_rows(loading, training, args.workers)
            ratios |= {name: training[name] for name in ("wait_share", "tower_over_cache")}
            figures |= {"loading": loading, "training": training}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(rows, ratios, figures)


def _preparing_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    seconds, count = found["seconds"], found["images"]
    return [
        ("images prepared", f"{count:,}"),
        ("  images a second", f"{found['images_per_second']:.4g}"),
        ("  the encoder alone", f"{found['encoder_images_per_second']:.4g}"),
        ("  bound by its operations at peak", f"{found['bound_images_per_second']:.4g}"),
        ("  its operations an image", f"{found['encoder_flops'] / 1e9:.3g} GFLOP"),
        ("  peak, a matrix product", f"{found['peak_flops'] / 1e9:.1f} GFLOP/s"),
        *(
            (f"  {kind}, ms an image", f"{1e3 * seconds[kind] / count:.3g}")
            for kind in ("read", "decode", "resize", "encode", "wait", "write")
        ),
    ]


def _loading_rows(loading: dict[str, float], training: dict[str, Any], workers: int) -> list[tuple[str, str]]:
    tower, cache = (sorted(training["step_s"][name])[len(training["step_s"][name]) // 2] for name in ("tower", "cache"))
    return [
        ("loader alone, threads", f"{workers}"),
        *((f"  {name} a second", f"{loading[f'{name}_per_second']:,.0f}") for name in ("samples", "tokens", "images")),
        ("  padding", f"{loading['padding_share']:.1%}"),
        ("training: waited for data", f"{training['wait_share']:.3%}"),
        (f"training step, {training['step_images']} images through the tower", f"{tower:.3f} s"),
        (f"training step, {training['tower_images']} images through the tower", f"{cache:.3f} s"),
    ]

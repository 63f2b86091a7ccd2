"""What one rank of a parity test does: a tiny model, fixed data, four optimiser steps."""

from dataclasses import replace

import torch
from pydantic import TypeAdapter

from htc_megatron.config import RunConfig
from htc_megatron.model.layout import ImageShape, MicroBatch, SequenceLayout

SEQ, ROWS, STEPS, MICROS = 64, 2, 4, 4
MODEL = {
    "backbone": dict(num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=61,
                     qkv_bias=True, max_position_embeddings=SEQ),
    "vision": dict(image_size=16, patch_size=4, hidden_size=16, ffn_hidden_size=32, num_layers=2, num_attention_heads=2),
    "mgvq": dict(image_size=16, widths=[8, 8], depths=[1, 1], decoder_depths=[1, 1], blocks=["res", "res"], latent_channels=8, groups=2,
                 codebook_size=32),
    "method": dict(num_anchors=2, anchor_hidden_size=24, voco_token_id=60),
}  # fmt: skip


def tiny_config(**changes) -> RunConfig:
    """A model small enough for eight processes; changes by dotted key."""
    tree: dict = {
        "model": {part: dict(values) for part, values in MODEL.items()},
        "parallel": {},
        "optimizer": dict(lr=1e-3, clip_grad=0.5, weight_decay=0.1),
        "training": dict(micro_batch_size=ROWS, global_batch_size=ROWS * MICROS, seq_length=SEQ, precision="fp32", freeze=[]),
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return TypeAdapter(RunConfig).validate_python(tree)


def micro_batch(config: RunConfig, seed: int, kinds: str = "itx") -> MicroBatch:
    """Packed rows; one sample a letter and row: i an image, d two images, t text only, x an image without supervision before it."""
    generator = torch.Generator().manual_seed(seed)
    image, model = ImageShape.from_config(config.model), config.model
    draw = lambda n: torch.randint(2, model.backbone.vocab_size - 1, (n,), generator=generator)  # noqa: E731
    ids, labels = torch.zeros(ROWS, SEQ, dtype=torch.int64), torch.full((ROWS, SEQ), -100)
    samples, images = [], []
    for row in range(ROWS):
        at = 0
        for kind in kinds[row:] + kinds[:row]:
            parts = {"i": [3, 6], "d": [2, 1, 5], "t": [7], "x": [0, 4]}[kind]
            if at + sum(parts) + (len(parts) - 1) * image.length > SEQ:
                continue
            start = at
            for index, length in enumerate(parts):
                if index:
                    images.append((len(samples), at))
                    ids[row, at + image.num_visual : at + image.length] = model.method.voco_token_id
                    at += image.length
                ids[row, at : at + length] = draw(length)
                at += length
            labels[row, at - 3 : at] = ids[row, at - 3 : at]
            samples.append((row, start, at))
    count = len(images)
    pixels = torch.randn(count, 3, model.vision.image_size, model.vision.image_size, generator=generator)
    rows = model.mgvq.codebook_size // model.mgvq.groups
    codes = torch.randint(0, rows, (count, model.mgvq.grid**2, model.mgvq.groups), generator=generator).to(torch.int16)
    integers = (torch.tensor(samples, dtype=torch.int64).view(-1, 3), torch.tensor(images, dtype=torch.int64).view(-1, 2))
    layout = SequenceLayout(ROWS, SEQ, *integers, image)
    return MicroBatch(ids, labels, layout, pixels if count else None, codes if count else None)


def global_batch(config: RunConfig, step: int, kinds: tuple[str, ...]) -> list[MicroBatch]:
    """MICROS micro-batches of a step, the same whatever the layout."""
    return [micro_batch(config, 1000 * step + index, kinds[index % len(kinds)]) for index in range(MICROS)]


def local_batches(config: RunConfig, step: int, kinds: tuple[str, ...], groups) -> list[MicroBatch]:
    """A rank's micro-batches of a step; pixels and codes on the first stage alone."""
    share = MICROS // groups.dp_size
    mine = global_batch(config, step, kinds)[groups.dp_rank * share : (groups.dp_rank + 1) * share]
    return mine if groups.first_stage else [replace(batch, pixel_values=None, codes=None) for batch in mine]


MIXED = ("it", "t", "dt", "xi")  # images, several images, and a micro-batch of text alone


def run_steps(changes: dict, zero: dict, kinds: tuple[str, ...] = MIXED, steps: int = STEPS) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    from htc_megatron.parallel import groups as process_groups
    from htc_megatron.training.build import build_engine
    from htc_megatron.training.step import train_step

    config = tiny_config(**changes)
    groups = process_groups.initialise(config.parallel, config.training.seed)
    engine = build_engine(config, zero, groups)
    results = []
    for step in range(steps):
        mine = local_batches(config, step, kinds, groups)
        result = train_step(engine, mine, config.optimizer.lr)
        results.append((result.loss, result.grad_norm))
    engine.destroy()
    return results


def frames_compiled(changes: dict, zero: dict) -> int:
    """How many Python frames torch.compile has taken while one step ran."""
    from torch._dynamo.utils import counters

    before = counters["frames"]["total"]
    run_steps(changes, zero, steps=1)
    return counters["frames"]["total"] - before

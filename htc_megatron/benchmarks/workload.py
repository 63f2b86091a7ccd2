"""A model of a wanted size and batches for it, without any file: what a benchmark trains."""

import math

import torch

from htc_megatron.config import (
    BackboneConfig,
    ConfigError,
    MethodConfig,
    MGVQConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from htc_megatron.model.layout import ImageShape, MicroBatch, SequenceLayout
from htc_megatron.weights.table import weights

HEAD, VOCABULARY, TEXT_BEFORE = 64, 8001, 8


def num_parameters(model: ModelConfig) -> int:
    """Entries of all weights, frozen ones included."""
    return sum(math.prod(weight.shape) for weight in weights(model))


def sized_model(parameters: float) -> ModelConfig:
    """An HTC-VLM of the width that brings it nearest to `parameters`, as deep as goes with that; images take 69 positions.

    Raises ConfigError if none comes within a quarter of it.
    """

    def of(layers: int, width: int) -> ModelConfig:
        heads = width // HEAD
        return ModelConfig(
            backbone=BackboneConfig(layers, width, width * 11 // 4, heads, heads, VOCABULARY),
            vision=VisionConfig(image_size=112, hidden_size=256, ffn_hidden_size=1024, num_layers=4, num_attention_heads=4),
            mgvq=MGVQConfig(image_size=112),
            method=MethodConfig(anchor_hidden_size=width, voco_token_id=VOCABULARY - 1),
        )

    def error(model: ModelConfig) -> float:
        return abs(num_parameters(model) / parameters - 1)

    for layers in (8, 4, 2):
        # four heads at a time, so that TP up to 4 divides them
        nearest = min((of(layers, width) for width in range(4 * HEAD, 8193, 4 * HEAD)), key=error)
        if error(nearest) <= 0.25:
            return nearest
    raise ConfigError(f"parameters: got {parameters:g}, but the nearest benchmark model has {num_parameters(nearest):g}")


def workload_config(
    parameters: float, tp: int, pp: int, dp: int, zero: str, precision: str, seq_length: int, micro_batches: int
) -> RunConfig:
    """A run of `micro_batches` micro-batches of one row on each of `dp` data-parallel ranks, everything trained but the tower."""
    return RunConfig(
        model=sized_model(parameters),
        parallel=ParallelConfig(tp, pp),
        training=TrainingConfig(micro_batch_size=1, global_batch_size=micro_batches * dp, seq_length=seq_length, precision=precision),
        zero=zero,
    )


def random_batch(config: RunConfig, seed: int, needs_pixels: bool, question: int = 0) -> MicroBatch:
    """A micro-batch of rows full of one sample each: a few words, an image, a question, and supervised words to the end of the row.

    question: words of it, unsupervised. With none the answer follows the image at once, as a caption does.
    """
    model, rows, length = config.model, config.training.micro_batch_size, config.training.seq_length
    image = ImageShape.from_config(model)
    behind = TEXT_BEFORE + image.length
    if length <= behind + question:
        raise ConfigError(f"seq_length: got {length}, wanted more than the {behind + question} places before the answer")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, model.backbone.vocab_size - 1, (rows, length), generator=generator)
    ids[:, TEXT_BEFORE : TEXT_BEFORE + image.num_visual] = 0
    ids[:, TEXT_BEFORE + image.num_visual : behind] = model.method.voco_token_id
    labels = torch.full_like(ids, -100)
    labels[:, behind + question :] = ids[:, behind + question :]
    samples = torch.tensor([[row, 0, length] for row in range(rows)])
    images = torch.tensor([[row, TEXT_BEFORE] for row in range(rows)])
    pixels = codes = None
    if needs_pixels:
        size, mgvq = model.vision.image_size, model.mgvq
        pixels = torch.randn(rows, 3, size, size, generator=generator)
        entries = mgvq.codebook_size // mgvq.groups
        codes = torch.randint(0, entries, (rows, mgvq.grid**2, mgvq.groups), generator=generator).to(torch.int16)
    return MicroBatch(ids, labels, SequenceLayout(rows, length, samples, images, image), pixels, codes)

"""A whole model of a few kilobytes, its tensor-parallel shares, and saving and checking it."""

import torch
from torch import nn

from htc_megatron import checkpoint
from htc_megatron.checkpoint import CheckpointReader, Place, PlainState
from htc_megatron.config import BackboneConfig, MethodConfig, MGVQConfig, ModelConfig, RunConfig, VisionConfig
from htc_megatron.model.naming import Entry
from htc_megatron.weights.table import partition, weights

MODEL = ModelConfig(
    backbone=BackboneConfig(2, 8, 12, 4, 2, 13, qkv_bias=True),
    vision=VisionConfig(28, 14, 8, 16, 2, 2),
    mgvq=MGVQConfig(32, (8, 8), (1, 1), (1, 1), ("res", "res"), 8, 8, 4, 16),
    method=MethodConfig(anchor_hidden_size=8, voco_token_id=12),
)


ONE = Place()


def whole_model(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {weight.name: torch.randn(weight.shape, generator=generator) for weight in weights(MODEL)}


def plain(tensors: dict[str, torch.Tensor], place: Place = ONE, fill: float | None = None) -> PlainState:
    """The share of a TP rank, as parameters. fill: their value instead of the tensors'."""
    entries = []
    for weight in weights(MODEL):
        part = partition(weight, place.tp_rank, place.tp_size)
        local = torch.zeros(part.view_shape)
        region = tuple(slice(a, a + n) for a, n in zip(part.offset, part.size, strict=True))
        local[tuple(slice(0, n) for n in part.size)] = tensors[weight.name][region]
        value = local.reshape(part.local_shape) if fill is None else torch.full(part.local_shape, fill)
        entries.append(Entry(weight.name, nn.Parameter(value), weight))
    return PlainState(entries, place)


def save(root, step: int = 1, seed: int = 0, **more):
    return checkpoint.save(root, plain(whole_model(seed)), step=step, config=RunConfig(model=MODEL), **more)


def check(folder, seed: int) -> None:
    reader = CheckpointReader(folder)
    reader.verify()
    for name, value in whole_model(seed).items():
        assert torch.equal(reader.tensor(name), value), name

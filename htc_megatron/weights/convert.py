"""One weight between its stored global form and Hugging Face's tensors, in both directions; pure functions."""

import torch
from torch import Tensor

from htc_megatron.config import ConfigError
from htc_megatron.weights.table import Weight


def to_hf(weight: Weight, tensor: Tensor) -> dict[str, Tensor]:
    """A weight in its stored global form -> the tensors of the export, by name. Raises ConfigError at another shape."""
    if tuple(tensor.shape) != weight.shape:
        raise ConfigError(f"{weight.name} has shape {tuple(tensor.shape)}, wanted {weight.shape}")
    if weight.rule == "qkv":
        parts = [part.flatten(0, 2) for part in _heads(weight, tensor).split((weight.queries_per_group, 1, 1), dim=1)]
    elif weight.rule == "gated":
        parts = list(tensor)
    else:
        parts = [tensor] * len(weight.hf)
    return dict(zip(weight.hf, parts, strict=True))


def from_hf(weight: Weight, tensors: dict[str, Tensor]) -> Tensor:
    """The inverse of `to_hf`. Raises ConfigError where a tensor is missing or does not fit."""
    missing = [name for name in weight.hf if name not in tensors]
    if missing:
        raise ConfigError(f"{weight.name} is made from {', '.join(weight.hf)}, but {', '.join(missing)} is missing")
    parts = [tensors[name] for name in weight.hf]
    try:
        if weight.rule == "qkv":
            counts = (weight.queries_per_group, 1, 1)
            shaped = [p.reshape(weight.groups, n, weight.head_dim, *p.shape[1:]) for p, n in zip(parts, counts, strict=True)]
            tensor = torch.cat(shaped, dim=1).flatten(0, 2)
        else:
            tensor = torch.stack(parts) if weight.rule == "gated" else parts[0]
    except RuntimeError:
        tensor = torch.empty(0)
    if tuple(tensor.shape) != weight.shape:
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in zip(weight.hf, parts, strict=True))
        raise ConfigError(f"{weight.name} of shape {weight.shape} cannot be made from {shapes}")
    return tensor


def _heads(weight: Weight, tensor: Tensor) -> Tensor:
    """[(groups * (queries_per_group + 2)) * head_dim, ...] -> [groups, queries_per_group + 2, head_dim, ...]."""
    return tensor.reshape(weight.groups, weight.queries_per_group + 2, weight.head_dim, *tensor.shape[1:])

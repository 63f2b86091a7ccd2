"""One weight between its stored global form and Hugging Face's tensors, in both directions; pure functions."""

from dataclasses import replace

import torch
from torch import Tensor

from htc_megatron.config import ConfigError
from htc_megatron.weights.table import Weight


def to_hf(weight: Weight, tensor: Tensor) -> dict[str, Tensor]:
    """A weight in its stored global form -> the tensors of the export, by name. Raises ConfigError at another shape."""
    if tuple(tensor.shape) != weight.shape:
        raise ConfigError(f"{weight.name} has shape {tuple(tensor.shape)}, wanted {weight.shape}")
    if weight.rule == "qkv":
        parts = [part.flatten(0, 2) for part in _heads(weight, tensor).split(weight.heads_per_group, dim=1)]
    elif weight.rule in ("gated", "stacked"):
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
            heads = zip(parts, weight.heads_per_group, strict=True)
            shaped = [part.reshape(weight.groups, count, weight.head_dim, *part.shape[1:]) for part, count in heads]
            tensor = torch.cat(shaped, dim=1).flatten(0, 2)
        else:
            tensor = torch.stack(parts) if weight.rule in ("gated", "stacked") else parts[0]
    except RuntimeError:
        tensor = torch.empty(0)
    if tuple(tensor.shape) != weight.shape:
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in zip(weight.hf, parts, strict=True))
        raise ConfigError(f"{weight.name} of shape {weight.shape} cannot be made from {shapes}")
    return tensor


def merge_lora(weight: Weight, base: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """A base weight with its adapters added: W + scale * B A for each linear in `weight.adapted`, as peft merges.

    All tensors are in their stored global form: `base` of `weight`, `lora_a` and `lora_b` of the rows that have its name with
    lora_A and lora_B for weight. scale: alpha / rank (LoraConfig.scale). Computed in fp32, returned in base's dtype. Raises
    ConfigError where the weight has no adapters or a shape is another.
    """
    if not weight.adapted:
        raise ConfigError(f"{weight.name} has no adapters that could be merged into it")
    rank, (outputs, inputs), fused = lora_b.shape[-1], weight.shape[-2:], weight.rule in ("qkv", "gated")
    chosen = replace(weight, hf=weight.adapted, linears=weight.adapted)
    if weight.rule == "qkv":
        outputs = weight.groups * sum(chosen.heads_per_group) * weight.head_dim
    count = (len(weight.adapted),)
    shape_a = (*(count if fused else ()), rank, inputs)
    shape_b = (*(count if weight.rule == "gated" else ()), outputs, rank)
    if tuple(lora_a.shape) != shape_a:
        raise ConfigError(f"lora_A of {weight.name} has shape {tuple(lora_a.shape)}, wanted {shape_a}")
    each_b = to_hf(replace(chosen, name=f"lora_B of {weight.name}", shape=shape_b), lora_b)
    each_a = lora_a if fused else lora_a[None]
    deltas = {linear: scale * (b.float() @ a.float()) for (linear, b), a in zip(each_b.items(), each_a, strict=True)}
    parts = to_hf(weight, base)
    for linear, name in zip(weight.linears, weight.hf, strict=True):
        if linear in deltas:
            parts[name] = (parts[name].float() + deltas[linear]).to(base.dtype)
    return from_hf(weight, parts)


def _heads(weight: Weight, tensor: Tensor) -> Tensor:
    """[groups * heads of a group * head_dim, ...] -> [groups, heads of a group, head_dim, ...]."""
    return tensor.reshape(weight.groups, sum(weight.heads_per_group), weight.head_dim, *tensor.shape[1:])

"""Weights of a new model, the same whatever the layout: every block of a tensor is drawn from its name, the seed and its index."""

import math
import zlib

import torch
from torch import Tensor

from htc_megatron.weights.table import Weight, partition

BLOCK = 1 << 20  # entries drawn from one generator; a rank draws only the blocks its share touches


def _standard_deviation(weight: Weight) -> float:
    """1 / sqrt(inputs), so that activations keep their size at any width; tables of the backbone likewise (0.016 at 4096).

    The vision tower's own tables are CLIP's 0.02.
    """
    if weight.name.startswith("frontend.vision.") and "embedding" in weight.name and "patch_embedding" not in weight.name:
        return 0.02
    return 1 / math.sqrt(math.prod(weight.shape[1:]) if "patch_embedding" in weight.name else weight.shape[-1])


def _drawn(weight: Weight, seed: int, start: int, stop: int) -> Tensor:
    """Entries [start, stop) of the flattened stored tensor: standard normal, an adapter's A uniform in [-1, 1)."""
    total, pieces = math.prod(weight.shape), []
    for first in range(start - start % BLOCK, stop, BLOCK):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{weight.name}/{first // BLOCK}".encode()))
        count = min(BLOCK, total - first)
        if weight.name.endswith(".lora_A"):
            values = torch.rand(count, generator=generator) * 2 - 1
        else:
            values = torch.randn(count, generator=generator)
        pieces.append(values[max(start - first, 0) : stop - first])
    return torch.cat(pieces)


def initial_value(weight: Weight, seed: int, tp_rank: int, tp_size: int) -> Tensor:
    """This TP rank's share of a new weight, fp32, in its local shape. Norms are one, biases zero, padding rows zero.

    Adapters as in peft: A uniform in +-1 / sqrt(inputs), B zero, so a new adapter changes nothing.
    """
    part = partition(weight, tp_rank, tp_size)
    last = weight.name.rsplit(".", 1)[-1]
    if "norm" in weight.name or last in ("bias", "lora_B"):
        return torch.full(part.local_shape, 1.0 if last == "weight" else 0.0)
    local = torch.zeros(part.view_shape)
    inner = math.prod(weight.shape[1:])
    step = max(1, BLOCK // inner)
    columns = tuple(slice(o, o + s) for o, s in zip(part.offset[1:], part.size[1:], strict=True))
    for row in range(0, part.size[0], step):
        count = min(step, part.size[0] - row)
        first = (part.offset[0] + row) * inner
        rows = _drawn(weight, seed, first, first + count * inner).view(count, *weight.shape[1:])
        local[row : row + count] = rows[(slice(None), *columns)]
    return local.mul_(_standard_deviation(weight)).view(part.local_shape)

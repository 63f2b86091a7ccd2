"""How the parts begin that an imported language model does not have: the voco row, the anchors' projector, rows of the vocabulary."""

import torch
from torch import Tensor

from htc_megatron.weights.table import Weight

CHUNK = 4096  # rows of a vocabulary matrix that are averaged at once


def voco_row(table: Tensor, new: str, seed: int) -> Tensor:
    """A new `<voco>` row, [1, H] fp32. new: mean (of the embedding `table`) | random (normal, of the table's standard deviation)."""
    if new == "mean":
        return _mean(table)[None]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, table.shape[1], generator=generator) * _deviation(table)


def anchors_at_mean(weight: Weight, table: Tensor, num_anchors: int) -> Tensor:
    """Weight or bias of P_d's last linear so that every anchor begins as the mean embedding: no weight, GELU's inverse as bias."""
    if weight.name.endswith("weight"):
        return torch.zeros(weight.shape)
    return inverse_gelu(_mean(table)).repeat(num_anchors)


def grown(table: Tensor, rows: int) -> Tensor:
    """A vocabulary matrix of `rows` rows: new ones stand behind its own, each the mean of these."""
    missing = rows - len(table)
    return torch.cat([table, _mean(table).to(table.dtype).expand(missing, -1)]) if missing else table


def inverse_gelu(y: Tensor) -> Tensor:
    """x >= -0.75 with GELU(x) = y, by bisection in float64; entries below GELU's least value, -0.17, give where that is."""
    low, high = torch.full_like(y, -0.7517, dtype=torch.float64), y.double().clamp_min(0) + 1
    for _ in range(60):
        middle = (low + high) / 2
        below = torch.nn.functional.gelu(middle) < y.double()
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).to(y.dtype)


def _mean(table: Tensor) -> Tensor:
    """Mean row, fp32, without a second copy of the matrix."""
    total = torch.zeros(table.shape[1], dtype=torch.float64)
    for rows in table.split(CHUNK):
        total += rows.double().sum(0)
    return (total / len(table)).float()


def _deviation(table: Tensor) -> float:
    """Root mean square distance of the entries from their column's mean."""
    mean, total = _mean(table).double(), 0.0
    for rows in table.split(CHUNK):
        total += float((rows.double() - mean).square().sum())
    return (total / table.numel()) ** 0.5

"""Fewer continuous tokens than patches: means of runs of them, or what learned queries read from the tower's features.

The Q-Former is built of given kinds of linears and norms: plain ones here, tensor-parallel ones where it is trained.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _means(x: Tensor, count: int, dim: int) -> Tensor:
    """Means of `count` runs along a dimension, whose lengths differ by one at most."""
    length = x.shape[dim]
    sizes = [(i + 1) * length // count - i * length // count for i in range(count)]
    return torch.stack([run.mean(dim) for run in x.split(sizes, dim)], dim)


def average_tokens(patches: Tensor, count: int) -> Tensor:
    """Patches of a square grid, [images, P, H] -> [images, count, H].

    A square count averages the cells of a coarser grid, any other one runs of patches row by row. All of a cell's or run's
    patches weigh the same, and every patch is in one of them.
    """
    side, coarser = math.isqrt(patches.shape[1]), math.isqrt(count)
    if coarser**2 != count:
        return _means(patches, count, 1)
    return _means(_means(patches.unflatten(1, (side, side)), coarser, 1), coarser, 2).flatten(1, 2)


class Kinds(NamedTuple):
    """How parts are made. column, row: (inputs, outputs) -> linear, a column's outputs going into a row only. norm: (width, eps)."""

    column: Callable[[int, int], nn.Module] = nn.Linear
    row: Callable[[int, int], nn.Module] = nn.Linear
    norm: Callable[[int, float], nn.Module] = nn.LayerNorm


class Attention(nn.Module):
    """x + attention of norm(x) over itself, or over a context."""

    def __init__(self, width: int, heads: int, eps: float, kinds: Kinds):
        super().__init__()
        self.head_dim = width // heads
        self.layernorm = kinds.norm(width, eps)
        self.q_proj, self.k_proj, self.v_proj = (kinds.column(width, width) for _ in range(3))
        self.out_proj = kinds.row(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[images, n, h], [images, m, h] -> [images, n, h]."""
        normed = self.layernorm(x)
        seen = normed if context is None else context
        projected = (self.q_proj(normed), self.k_proj(seen), self.v_proj(seen))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projected)
        return x + self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """x + MLP of norm(x), with GELU."""

    def __init__(self, width: int, inner: int, eps: float, kinds: Kinds):
        super().__init__()
        self.layernorm = kinds.norm(width, eps)
        self.fc1, self.fc2 = kinds.column(width, inner), kinds.row(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.layernorm(x))))


class QFormerLayer(nn.Module):
    """Queries look at each other, then at the features."""

    def __init__(self, width: int, inner: int, heads: int, eps: float, kinds: Kinds):
        super().__init__()
        self.self_attention, self.cross_attention = (Attention(width, heads, eps, kinds) for _ in range(2))
        self.mlp = MLP(width, inner, eps, kinds)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        return self.mlp(self.cross_attention(self.self_attention(x), features))


class QFormer(nn.Module):
    """Learned queries that read the features of an image through pre-norm layers (BLIP-2, arXiv 2301.12597, without its text side).

    queries: their number. width, inner, heads, eps: of the tower, whose sizes the layers have. dtype: of the queries.
    """

    def __init__(
        self,
        queries: int,
        layers: int,
        width: int,
        inner: int,
        heads: int,
        eps: float,
        kinds: Kinds = Kinds(),  # noqa: B008 - immutable
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width, dtype=dtype) * width**-0.5)
        self.input_layernorm = kinds.norm(width, eps)
        self.layers = nn.ModuleList(QFormerLayer(width, inner, heads, eps, kinds) for _ in range(layers))
        self.final_layernorm = kinds.norm(width, eps)

    def forward(self, features: Tensor) -> Tensor:
        """[images, P, h] -> [images, queries, h]."""
        x, features = self.queries.expand(len(features), -1, -1), self.input_layernorm(features)
        for layer in self.layers:
            x = layer(x, features)
        return self.final_layernorm(x)

"""LoRA adapters on tensor-parallel linears: y = W x + scale * B A x, with W frozen (Hu et al. 2021, as peft computes it).

mcore fuses q, k, v and gate, up; Hugging Face, and so peft, has an A and a B for each of them. Here the As of a fused linear
lie below each other and are one product; the Bs keep the fused weight's order of rows and are spread over as many columns as
there are As, zero where a row is not an A's own, so that they are one product too.

Gradients over TP, where TP ranks see the same tokens (or, with sequence parallelism, their shares of them):

             A                                  between them, [s, b, rank] an A      B
column       whole on each rank                 copied; its gradient is summed       cut like the weight
  sequence   its gradient is summed             gathered; its gradient is scattered  cut like the weight
row          cut like the weight                summed                               whole on each rank
  sequence   cut like the weight                summed and scattered                 its gradient is summed

There is no dropout: its mask would be another one on each layout.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from htc_megatron.model.decoder import QKVLinear


@dataclass(frozen=True)
class Fused:
    """Which output rows of a fused linear are whose: over all TP ranks, `groups` times the rows of each linear in turn.

    rows: of each linear in one group. adapted: whether it has an adapter; at least one has.
    """

    groups: int
    rows: tuple[int, ...]
    adapted: tuple[bool, ...]

    @property
    def adapted_rows(self) -> tuple[int, ...]:
        return tuple(rows for rows, adapted in zip(self.rows, self.adapted, strict=True) if adapted)

    def spread(self, lora_b: Tensor) -> Tensor:
        """[groups here * adapted rows, rank] -> [groups here * all rows, adapters * rank]: each row in its own A's columns."""
        rank, mine = lora_b.shape[-1], self.adapted_rows
        parts = iter(lora_b.view(-1, sum(mine), rank).split(mine, dim=1))
        groups, last, found, at = lora_b.shape[0] // sum(mine), len(mine) - 1, [], 0
        for rows, adapted in zip(self.rows, self.adapted, strict=True):
            if adapted:
                found.append(F.pad(next(parts), (at * rank, (last - at) * rank)))
                at += 1
            else:
                found.append(lora_b.new_zeros(groups, rows, len(mine) * rank))
        return torch.cat(found, dim=1).flatten(0, 1)


def _parameter(rows: int, columns: int, like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns, dtype=like.dtype, device=like.device))


class _ColumnAdapters:
    """Adapters of a column-parallel linear.

    rank, scale: of every adapter, and what B A is multiplied by.
    fused: which of its output rows have one.
    """

    def add_adapters(self, rank: int, scale: float, fused: Fused) -> None:
        self.scale, self.fused = scale, fused
        rows = fused.groups // (self.output_size // self.output_size_per_partition) * sum(fused.adapted_rows)
        self.lora_A = _parameter(len(fused.adapted_rows) * rank, self.input_size, self.weight)
        self.lora_B = _parameter(rows, rank, self.weight)

    def adapted(self, rows: Tensor, part: Callable[[Tensor], Tensor] = lambda weight: weight) -> Tensor:
        """scale * B A x: [s (/ tp), b, in] -> [s, b, out / tp], or the output rows that `part` takes of a weight."""
        if self.sequence_parallel:
            lora_a = tensor_parallel.copy_to_tensor_model_parallel_region(self.lora_A, group=self.tp_group)
            hidden = tensor_parallel.gather_from_sequence_parallel_region(F.linear(rows, lora_a), group=self.tp_group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(F.linear(rows, self.lora_A), group=self.tp_group)
        return F.linear(hidden * self.scale, part(self.fused.spread(self.lora_B)))


class LoraColumnParallelLinear(_ColumnAdapters, ColumnParallelLinear):
    """A column-parallel linear with adapters; its arguments are ColumnParallelLinear's and the adapters'."""

    def __init__(self, input_size: int, output_size: int, *, rank: int, scale: float, fused: Fused, **options):
        super().__init__(input_size, output_size, **options)
        self.add_adapters(rank, scale, fused)

    def forward(self, input_: Tensor, **options) -> tuple[Tensor, Tensor | None]:
        """[s (/ tp), b, in] -> [s, b, out / tp], as ColumnParallelLinear's."""
        output, bias = super().forward(input_, **options)
        return output + self.adapted(input_), bias


class LoraQKVLinear(_ColumnAdapters, QKVLinear):
    """A fused linear for queries, keys and values with adapters; its arguments are QKVLinear's and the adapters'."""

    def __init__(self, input_size: int, output_size: int, *, rank: int, scale: float, fused: Fused, **options):
        super().__init__(input_size, output_size, **options)
        self.add_adapters(rank, scale, fused)

    def forward(self, rows: Tensor, language: int, bare: bool) -> Tensor:
        """As QKVLinear's."""
        zones = rows.split([language, len(rows) - language])
        adapted = [
            self.adapted(zone, lambda weight, few=few: self.part(weight, few)) for zone, few in zip(zones, (False, bare), strict=True)
        ]
        return super().forward(rows, language, bare) + torch.cat([found.flatten() for found in adapted])


class LoraRowParallelLinear(RowParallelLinear):
    """A row-parallel linear with an adapter; its arguments are RowParallelLinear's and `rank` and `scale` of the adapter."""

    def __init__(self, input_size: int, output_size: int, *, rank: int, scale: float, **options):
        super().__init__(input_size, output_size, **options)
        self.scale = scale
        self.lora_A = _parameter(rank, self.input_size_per_partition, self.weight)
        self.lora_B = _parameter(output_size, rank, self.weight)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, in / tp] -> [s (/ tp), b, out], as RowParallelLinear's."""
        output, bias = super().forward(input_)
        hidden, lora_b = F.linear(input_, self.lora_A), self.lora_B
        if self.sequence_parallel:
            hidden = tensor_parallel.reduce_scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
            lora_b = tensor_parallel.copy_to_tensor_model_parallel_region(lora_b, group=self.tp_group)
        else:
            hidden = tensor_parallel.reduce_from_tensor_model_parallel_region(hidden, group=self.tp_group)
        return output + F.linear(hidden * self.scale, lora_b), bias

"""One layer of the backbone on rows in the order of model/rows.py: mcore's modules, our way through them.

mcore's own layer computes queries, keys and values of every token and every row of every layer. Here V rows have no query
where they ask nothing, and nothing is computed that nobody reads: behind the last layer only some rows are; so the last layer needs
no V rows at all, and the one before it only their keys and values.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from htc_megatron.model.attention import LayoutParams
from htc_megatron.model.elementwise import forget, rms_norm, rotary_, swiglu


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32; works under sequence parallelism, which mcore's torch norm refuses.

    Under sequence parallelism each TP rank sees its share of the tokens, so the weight's gradient is summed over TP.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self.sum_over_tp = config.sequence_parallel
        self.kept: Tensor | None = None  # the weight of the last call, for `again`

    def forward(self, x: Tensor, keep: bool = False) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype. keep: `again` will be asked for."""
        # a copy: under ZeRO-3 the parameter is cut again as soon as this call ends
        self.kept = self.weight.detach().clone() if keep else None
        weight = tensor_parallel.copy_to_tensor_model_parallel_region(self.weight) if self.sum_over_tp else self.weight
        return rms_norm(x, weight, self.eps)

    def again(self, x: Tensor) -> Callable[[], Tensor]:
        """What computes the last call's result once more, without a graph. x: its input."""
        kept, weight = x.detach(), self.kept
        return lambda: rms_norm(kept, weight, self.eps)


class QKVLinear(ColumnParallelLinear):
    """mcore's fused linear for queries, keys and values, which leaves out the queries of rows that have none.

    Its arguments are ColumnParallelLinear's and group_rows: rows of the weight in a group, (of queries, of key and value).
    """

    def __init__(self, input_size: int, output_size: int, *, group_rows: tuple[int, int], **options):
        super().__init__(input_size, output_size, **options)
        self.group_rows = group_rows

    def forward(self, rows: Tensor, language: int, bare: bool) -> Tensor:
        """Rows of both zones, [n (/ tp), 1, in], the first `language` of which are the language zone's (of this rank).

        Returns, flat, the results of the language zone [m, out / tp] and behind them those of the visual zone, without queries where
        `bare`. One tensor whatever the micro-batch holds: ZeRO-3 counts a module's outputs on their way back, on every rank alike.
        """
        return _SelectiveLinear.apply(rows.squeeze(1), self.weight, self.bias, self, language, bare)

    def part(self, weight: Tensor, bare: bool) -> Tensor:
        """The rows [groups x (queries, key, value), ...] of a weight, or those of keys and values (a copy)."""
        if not bare:
            return weight
        return weight.unflatten(0, (-1, sum(self.group_rows))).split(self.group_rows, 1)[1].flatten(0, 1)


class _SelectiveLinear(torch.autograd.Function):
    """QKVLinear's products and, over TP, what mcore's column-parallel linear exchanges; the part of the weight is not kept."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor | None, layer: QKVLinear, language: int, bare: bool) -> Tensor:
        ctx.layer, ctx.language, ctx.bare = layer, language, bare
        ctx.save_for_backward(rows if weight.requires_grad else None, weight)
        ctx.has_bias = bias is not None
        zones = _zones(rows, language, layer)
        sizes = [len(zone) * len(layer.part(weight[:, :1], bare and i == 1)) for i, zone in enumerate(zones)]
        found = rows.new_empty(sum(sizes))
        for zone, out, few in zip(zones, found.split(sizes), (False, bare), strict=True):
            if not len(zone):
                continue
            matrix, out = layer.part(weight, few).T, out.view(len(zone), -1)
            if bias is None:
                torch.mm(zone, matrix, out=out)
            else:
                torch.addmm(layer.part(bias, few), zone, matrix, out=out)
        return found

    @staticmethod
    def backward(ctx, grad: Tensor):
        layer, (rows, weight) = ctx.layer, ctx.saved_tensors
        tp = layer.tp_group.size()
        gathered = tp if layer.sequence_parallel else 1
        num_rows = ctx.language * gathered
        first = num_rows * len(weight)
        grads = [grad[:first].view(num_rows, -1)]
        d_rows, waits, rest = [], [], grad[first:]
        if len(rest):
            grads.append(rest.view(-1, len(layer.part(weight[:, :1], ctx.bare))))
        for of_zone, few in zip(grads, (False, ctx.bare), strict=False):
            found = of_zone @ layer.part(weight, few)
            if layer.sequence_parallel:
                share = found.new_empty(len(found) // tp, found.shape[1])
                waits.append((dist.reduce_scatter_tensor(share, found, group=layer.tp_group, async_op=True), found))
                found = share
            elif tp > 1:
                waits.append((dist.all_reduce(found, group=layer.tp_group, async_op=True), found))
            d_rows.append(found)
        d_weight = d_bias = None
        if ctx.needs_input_grad[1]:
            mine, theirs = _zones(rows, ctx.language, layer)
            d_weight = grads[0].T @ mine
            if len(theirs):
                of_part = grads[1].T @ theirs
                _add_part(layer, d_weight, of_part, ctx.bare)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            d_bias = grads[0].sum(0)
            if len(rest):
                _add_part(layer, d_bias, grads[1].sum(0), ctx.bare)
        for work, _ in waits:
            work.wait()
        return torch.cat(d_rows) if len(d_rows) > 1 else d_rows[0], d_weight, d_bias, None, None, None


def _zones(rows: Tensor, language: int, layer: QKVLinear) -> list[Tensor]:
    """Whole language and visual zones from this rank's rows: with sequence parallelism gathered over TP."""
    found = []
    for zone in rows.split([language, len(rows) - language]):
        if layer.sequence_parallel and len(zone):
            whole = zone.new_empty(len(zone) * layer.tp_group.size(), zone.shape[1])
            dist.all_gather_into_tensor(whole, zone.contiguous(), group=layer.tp_group)
            zone = whole
        found.append(zone)
    return found


def _add_part(layer: QKVLinear, whole: Tensor, part: Tensor, bare: bool) -> None:
    """Add to a gradient what `layer.part` of it has come by."""
    if not bare:
        whole += part
        return
    groups = whole.unflatten(0, (-1, sum(layer.group_rows))).split(layer.group_rows, 1)[1]
    groups += part.view(groups.shape)


class LayoutSelfAttention(SelfAttention):
    """mcore's self-attention under M_hy."""

    def forward(self, rows: Tensor, params: LayoutParams, images: bool = True, visual: bool = True) -> Tensor:
        """Normed rows [n (/ tp), 1, H] -> what `linear_proj` takes: [n, 1, heads / tp * d], in the ranks' order of shares.

        images False: rows are of the language zone alone, and the result is of the text rows alone.
        visual False: the result is of the language zone alone.
        """
        order, bare = params.order, not params.queries_everywhere
        found = self.linear_qkv(rows, order.local[0], bare)
        d, groups = self.hidden_size_per_attention_head, self.num_query_groups_per_partition
        first = order.language * (self.num_attention_heads_per_partition + 2 * groups) * d

        def heads(flat: Tensor) -> list[tuple[Tensor, ...]]:
            """`_heads` of each zone that has rows."""
            mine, theirs = flat.split([first, len(flat) - first])
            return [self._heads(mine, False), *([self._heads(theirs, bare)] if len(theirs) else [])]

        def turning(flat: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
            turns = [(x.split([order.language, order.visual])) for x in (params.cos[:, None, None], params.sin[:, None, None])]
            return [(x, turns[0][zone], turns[1][zone]) for zone, parts in enumerate(heads(flat)) for x in parts[:-1]]

        found = rotary_(found, turning)
        language, *zones = heads(found)
        query, *(keys, values) = (x.flatten(1, 2) for x in language)
        keys, values = (keys, keys[:0]), (values, values[:0])
        for zone in zones:
            *queries, key, value = (x.flatten(1, 2) for x in zone)
            keys, values = (keys[0], key), (values[0], value)
            query = torch.cat([query, *queries])
        return self.core_attention.attend(query, keys, values, params, images, visual).flatten(1).unsqueeze(1)

    def _heads(self, flat: Tensor, bare: bool) -> tuple[Tensor, ...]:
        """One zone's results of linear_qkv, flat -> (queries unless bare,) keys and values, [n, groups, heads of a group, d]."""
        d, groups = self.hidden_size_per_attention_head, self.num_query_groups_per_partition
        of_group = self.num_attention_heads_per_partition // groups
        sizes = [1, 1] if bare else [of_group, 1, 1]
        return flat.view(-1, groups, sum(sizes), d).split(sizes, 2)


class DecoderLayer(TransformerLayer):
    """LLaMA's layer. With selective recomputation norms and SwiGLU are not kept but made again; matrix products are kept."""

    behind = 0  # layers of the whole backbone behind this one: set by the model

    def forward(self, hidden_states: Tensor, packed_seq_params: LayoutParams | None = None, attention_mask=None, **_):
        """Rows [n (/ tp), 1, H] -> the same, or in the last layer the rows alone that `packed_seq_params` wants; and None."""
        params = packed_seq_params
        if not isinstance(params, LayoutParams):
            raise RuntimeError("a layer was called without the micro-batch's layout: the mask would be lost")
        if attention_mask is not None:
            raise RuntimeError("attention takes its mask from the layout alone, but a mask tensor was passed")
        reach = self.behind + params.needs_images if params.wanted is not None else 2
        images, visual, last = reach > 0, reach > 1, self.behind == 0 and params.wanted is not None
        if not images:
            hidden_states = hidden_states[: params.order.local[0]]
        again = self.config.recompute_granularity == "selective" and torch.is_grad_enabled()
        normed = self.input_layernorm(hidden_states, keep=again)
        found = self.self_attention(normed, params, images, visual)
        if again:
            forget(normed, self.input_layernorm.again(hidden_states), found)
        if not visual:
            hidden_states = hidden_states[: params.order.local[0]]
        if last:
            found, hidden_states = self._wanted(found, hidden_states, params)
        hidden_states = hidden_states + self.self_attention.linear_proj(found)[0]
        normed = self.pre_mlp_layernorm(hidden_states, keep=again)
        gates = self.mlp.linear_fc1(normed)[0]
        if again:
            forget(normed, self.pre_mlp_layernorm.again(hidden_states), gates)
        inner = swiglu(gates)
        out = self.mlp.linear_fc2(inner)[0]
        if again:
            kept = gates.detach()
            forget(inner, lambda: swiglu(kept), out)
        return hidden_states + out, None

    def _wanted(self, found: Tensor, hidden: Tensor, params: LayoutParams) -> tuple[Tensor, Tensor]:
        """Of attention's results and of the residual the rows that are read, shared out again under sequence parallelism."""
        shares, wanted = params.order.shares, params.wanted
        rows = F.pad(wanted, (0, -len(wanted) % shares))
        if shares == 1:
            return found.index_select(0, rows), hidden.index_select(0, rows)
        group = self.tp_group
        whole = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=group)
        return found.index_select(0, rows), tensor_parallel.scatter_to_sequence_parallel_region(whole.index_select(0, rows), group=group)

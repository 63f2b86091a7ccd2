"""M_hy as exact structured attention: no [S, S] mask is ever built on this road.

With a sample's text W (its prefix included), images V_i and vocos Z_i the mask splits exactly into
  - V rows under `star`: softmax over their own key alone, so the output is their own value (plus a visible prefix, if any);
  - Z rows: K rows over the N + K keys of their image (plus a visible prefix);
  - causal segments: text over the text and voco tokens of its sample, whole images under `full`, whole samples under `none`.
Segments of like length are padded on the right to one length; causality alone keeps the padding out, so each part is one
fused SDPA call without a mask (Z rows use a [K, N + K] one where K > 1).

Everything is in the order of model/rows.py. Under `star` without a visible prefix V rows ask nothing: they need no query at
all, and their keys lie side by side as the Z rows want them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from htc_megatron.hf.anchors_htc_vlm import attention_of_cls
from htc_megatron.model.attention_plan import AttentionPlan, CausalSegments, plan_attention
from htc_megatron.model.layout import SequenceLayout
from htc_megatron.model.mask import MaskRule, dense_mask
from htc_megatron.model.rows import RowOrder


class _Take(torch.autograd.Function):
    """x[rows] of rows that occur once each, padding aside; backward copies instead of adding up."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, real: Tensor) -> Tensor:
        flat = rows.reshape(-1)
        ctx.save_for_backward(flat, real)
        ctx.size = len(x)
        return x.index_select(0, flat).view(*rows.shape, *x.shape[1:])

    @staticmethod
    def backward(ctx, grad: Tensor):
        flat, real = ctx.saved_tensors
        grad = grad.flatten(0, 1)
        found = grad.new_zeros(ctx.size, *grad.shape[1:])
        return found.index_copy_(0, flat.index_select(0, real), grad.index_select(0, real)), None, None


def _causal_results(query: Tensor, key: Tensor, value: Tensor, part: CausalSegments, scale: float) -> Tensor:
    """Results of a part at its `source`: [r, heads, d]."""
    repeat = query.shape[1] // key.shape[1]
    take = (lambda x: x[part.rows]) if part.repeats else (lambda x: _Take.apply(x, part.rows, part.real))
    q, k, v = (take(x).transpose(1, 2) for x in (query, key, value))
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, part.source)


def split_attention(
    query: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    plan: AttentionPlan,
    scale: float,
    images: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention under M_hy by its exact split, in the order of rows.

    query: [rows, heads, d], of the language zone alone where the plan says own_image_only; keys, values: of the language and
    the visual zone, [rows of the zone, groups, d], groups dividing heads; rotary already applied.
    images False: only text rows are asked for, and text does not see V_hy: query, keys[0] and values[0] of the language zone suffice.
    Returns [rows, heads, d] of both zones; without `images` of the text rows, and None.
    """
    if not images:
        return _text_rows(query, keys[0], values[0], plan, scale), None
    if plan.own_image_only:
        return _own_image_attention(query, keys, values, plan, scale)
    key, value = torch.cat(keys), torch.cat(values)
    heads, repeat = query.shape[1], query.shape[1] // key.shape[1]

    def take(x: Tensor, rows: Tensor, times: int = 1) -> Tensor:
        """[n, l] rows -> [n, heads, l, d]"""
        return x[rows].repeat_interleave(times, 2).transpose(1, 2) if times > 1 else x[rows].transpose(1, 2)

    segments = plan.text + plan.image_segments
    results = [_causal_results(query, key, value, part, scale) for part in segments]
    targets = [part.target for part in segments]
    for part in plan.image_rows:
        q, k, v = take(query, part.queries), take(key, part.keys, repeat), take(value, part.keys, repeat)
        if part.own:
            out = _shared_and_own(q, k, v, take(key, part.queries, repeat), take(value, part.queries, repeat), part.mask, scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=part.mask, scale=scale)
        results.append(out.transpose(1, 2).reshape(-1, heads, query.shape[2]))
        targets.append(part.queries.reshape(-1))

    own = value.repeat_interleave(repeat, 1) if repeat > 1 else value  # star's V rows, and filling
    if results:
        own = own.index_copy(0, torch.cat(targets), torch.cat(results).to(own.dtype))
    return own.split([plan.order.language, plan.order.visual])


def _text_rows(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Attention of the text rows, all arguments of the language zone. [num_text, heads, d]"""
    results = [_causal_results(query, key, value, part, scale) for part in plan.text]
    if not results:
        return query[:0]
    text = torch.cat(results) if len(results) > 1 else results[0]
    return text if plan.text_order is None else text.index_select(0, plan.text_order)


class _VocoRows(torch.autograd.Function):
    """Z rows over their own image, and V rows, which get their own value.

    query: [images, groups, r, d], r = heads of a group x K. Keys and values [images, K or N, groups, d] of voco and V_hy are read
    where they lie: by SDPA they would have to be put together first, and there is nothing here but reading and writing them.
    """

    @staticmethod
    def forward(ctx, query, voco_key, voco_value, key, value, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        scores = torch.cat([_products(query, key), _products(query, voco_key)], -1) * scale
        if mask is not None:
            scores = scores.masked_fill_(~mask, float("-inf"))
        weight = scores.softmax(-1)
        ctx.save_for_backward(query, voco_key, voco_value, key, value, weight)
        ctx.scale = scale
        over_image, over_voco = weight.to(value.dtype).split([key.shape[1], voco_key.shape[1]], -1)
        return _sums(over_image, value) + _sums(over_voco, voco_value), value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor, grad_own: Tensor):
        query, voco_key, voco_value, key, value, weight = ctx.saved_tensors
        sizes = [key.shape[1], voco_key.shape[1]]
        d_weight = torch.cat([_products(grad, value), _products(grad, voco_value)], -1)
        d_scores = (d_weight - (d_weight * weight).sum(-1, keepdim=True)).mul_(weight).mul_(ctx.scale).to(query.dtype)
        (over_image, over_voco), (scores, voco_scores) = (x.to(query.dtype).split(sizes, -1) for x in (weight, d_scores))
        d_query = _sums(scores, key) + _sums(voco_scores, voco_key)
        d_voco = [_spread(voco_scores, query), _spread(over_voco, grad)]
        return d_query, *d_voco, _spread(scores, query), _spread(over_image, grad, grad_own), None, None


def _products(rows: Tensor, keys: Tensor) -> Tensor:
    """Each row with each key, in fp32 at least: [images, groups, r, d], [images, n, groups, d] -> [images, groups, r, n]."""
    precise = torch.promote_types(rows.dtype, torch.float32)
    rows, keys = rows.to(precise), keys.to(precise)
    return _stacked([row @ key.permute(1, 2, 0) for row, key in zip(rows, keys, strict=True)])  # of one image keys are not copied


def _sums(weight: Tensor, values: Tensor) -> Tensor:
    """Weighted sums of values: [images, groups, r, n], [images, n, groups, d] -> [images, groups, r, d]."""
    return _stacked([one @ value.transpose(0, 1) for one, value in zip(weight, values, strict=True)])


def _stacked(images: list[Tensor]) -> Tensor:
    """torch.stack, without a copy of a single one."""
    return torch.stack(images) if len(images) > 1 else images[0][None]


def _spread(weight: Tensor, rows: Tensor, onto: Tensor | None = None) -> Tensor:
    """Every key's weighted sum of rows: [images, groups, r, n], [images, groups, r, d] (+ onto) -> [images, n, groups, d]."""
    if weight.shape[2] > 1:
        found = (weight.transpose(2, 3) @ rows).transpose(1, 2)
        return found.contiguous() if onto is None else found + onto
    weight, rows = weight[:, :, 0, :, None].transpose(1, 2), rows.transpose(1, 2)
    return weight * rows if onto is None else torch.addcmul(onto, weight, rows)


def _own_image_attention(query, keys, values, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """`star` without a visible prefix: text in causal segments, Z rows over their image, V rows as they are."""
    order, (_, heads, d), groups = plan.order, query.shape, keys[0].shape[1]
    text = _text_rows(query, keys[0], values[0], plan, scale)
    sizes = [order.num_text, order.num_voco, order.language - order.num_text - order.num_voco]
    count, num_voco = order.num_images, order.image.num_voco
    parts, own = [text], values[1]
    if count and num_voco:
        q = query.split(sizes)[1].reshape(count, num_voco, groups, heads // groups, d)
        q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)  # no key is repeated for the heads of its group
        mine = (x[0].split(sizes)[1].unflatten(0, (count, num_voco)) for x in (keys, values))
        fill = order.visual - order.num_visual
        key, own = (x[1][: order.num_visual] if fill else x[1] for x in (keys, values))  # a part's gradient would be copied
        mask = None if plan.voco_mask is None else plan.voco_mask.repeat(heads // groups, 1)
        images = (x.unflatten(0, (count, -1)) for x in (key, own))
        out, own = _VocoRows.apply(q, *mine, *images, mask, scale)
        own = own.flatten(0, 1)
        own = torch.cat([own, values[1][order.num_visual :]]) if fill else own
        parts.append(out.unflatten(2, (heads // groups, num_voco)).permute(0, 3, 1, 2, 4).reshape(-1, heads, d))
    if sizes[2]:
        parts.append(text.new_zeros(sizes[2], heads, d))
    return torch.cat(parts), own.repeat_interleave(heads // groups, 1) if heads > groups else own


def _shared_and_own(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Each query sees the shared keys that `mask` allows and its own key. All [n, heads, l, d]; softmax in fp32 at least."""
    precise = torch.promote_types(q.dtype, torch.float32)
    shared = (q @ k.transpose(-1, -2)).to(precise) * scale
    shared = shared.masked_fill(~mask, float("-inf"))
    own = (q * own_k).sum(-1, keepdim=True).to(precise) * scale
    weight = torch.cat([shared, own], -1).softmax(-1).to(v.dtype)
    return weight[..., :-1] @ v + weight[..., -1:] * own_v


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The reference: SDPA with a [b, s, s] bool mask. query: [b, s, heads, d]; key, value: [b, s, groups, d] -> [b, s, heads, d]."""
    repeat = query.shape[2] // key.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale).transpose(1, 2)


@dataclass
class LayoutParams(PackedSeqParams):
    """Carries what a micro-batch's layout decides to every layer, by mcore's own parameter for packed sequences.

    order: of the rows. cos, sin: [rows, d / 2], of the rows' positions, in the activations' precision.
    plan: of the split attention; or mask [b, s, s] for the reference, which computes every row in every layer.
    wanted: rows of the language zone that are read behind the last layer, and what they do not need is left out; None: all are read.
    needs_images: whether these rows need V_hy in the last layer.
    """

    order: RowOrder | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    plan: AttentionPlan | None = None
    mask: Tensor | None = None
    wanted: Tensor | None = None
    needs_images: bool = True

    @property
    def queries_everywhere(self) -> bool:
        """Whether V rows need queries."""
        return self.plan is None or not self.plan.own_image_only

    @classmethod
    def from_layout(cls, layout: SequenceLayout, rule: MaskRule, attention: str, device: torch.device, shares: int = 1) -> "LayoutParams":
        """attention: split | dense. shares: as of RowOrder."""
        order = RowOrder.of(layout, shares)
        if attention == "dense":
            return cls(qkv_format="sbhd", order=order, mask=dense_mask(layout, rule).to(device))
        return cls(qkv_format="sbhd", order=order, plan=plan_attention(layout, rule, order).to(device))

    def read_only(self, rows: Tensor, device: torch.device) -> None:
        """Let the layers compute what is needed for `rows` [n] of the language zone alone. Nothing changes for the reference.

        rows: on CPU, where asking what is among them holds no device up.
        """
        if self.plan is None:
            return
        self.wanted = rows.to(device)
        self.needs_images = self.plan.text_sees_images or bool((rows >= self.order.num_text).any())


class LayoutAttention(nn.Module):
    """Core attention of the backbone's layers under M_hy; refuses to run without a layout."""

    def __init__(self, config, layer_number, attn_mask_type=None, attention_type="self", softmax_scale=None, **_):
        super().__init__()
        if attention_type != "self":
            raise ValueError(f"LayoutAttention is self-attention only, not {attention_type!r}")
        self.scale = softmax_scale or config.softmax_scale or config.kv_channels**-0.5

    def attend(
        self,
        query: Tensor,
        keys: tuple[Tensor, Tensor],
        values: tuple[Tensor, Tensor],
        params: LayoutParams,
        images: bool = True,
        visual: bool = True,
    ) -> Tensor:
        """`split_attention`, or the reference on the same rows; all local to this TP rank.

        Returns [rows, heads, d] in the ranks' order of shares; without `visual` of the language zone, without `images` of the text rows.
        No `forward`: hooks would have to see the same tensors here whatever the micro-batch holds.
        """
        order = params.order
        if params.mask is None:
            language, of_images = split_attention(query, keys, values, params.plan, self.scale, images)
            return order.share_out(language, of_images) if images and visual else language
        at = [order.at_places(x).unflatten(0, params.mask.shape[:2]) for x in (query, torch.cat(keys), torch.cat(values))]
        out = dense_attention(*at, params.mask, self.scale).flatten(0, 1)
        rows = out[order.places.to(out.device).clamp_min(0)]
        return order.share_out(*rows.split([order.language, order.visual]))


class FullAttention(nn.Module):
    """Core attention of the vision tower: every token sees every token of its image.

    watch: leave in `of_cls` what the first token attends to, without a graph, summed over all heads: [b, s - 1] fp32.
    """

    def __init__(self, config, layer_number, attn_mask_type=None, attention_type="self", softmax_scale=None, **_):
        super().__init__()
        self.scale = softmax_scale or config.softmax_scale or config.kv_channels**-0.5
        self.watch, self.of_cls = False, None

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None, packed_seq_params=None) -> Tensor:
        """query, key, value: [s, b, heads, d] -> [s, b, heads * d]."""
        s, b, heads, d = query.shape
        if self.watch:
            with torch.no_grad():
                mine = attention_of_cls(query[0], key.permute(1, 2, 0, 3), self.scale)
                self.of_cls = reduce_from_tensor_model_parallel_region(mine.contiguous())  # else the sum goes into a copy
        out = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), scale=self.scale)
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)

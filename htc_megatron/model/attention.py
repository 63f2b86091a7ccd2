"""M_hy as exact structured attention: no [S, S] mask is ever built on this road.

With a sample's text W (its prefix included), images V_i and vocos Z_i the mask splits exactly into
  - V rows under `star`: softmax over their own key alone, so the output is their own value (plus a visible prefix, if any);
  - Z rows: K rows over the N + K keys of their image (plus a visible prefix);
  - causal segments: text over the text and voco tokens of its sample, whole images under `full`, whole samples under `none`.
Segments of different lengths are padded on the right; causality alone keeps the padding out, so each part is one
fused SDPA call without a mask (Z rows use a [K, N + K] one where K > 1).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from htc_megatron.model.layout import SequenceLayout
from htc_megatron.model.mask import PADDING, TEXT, MaskRule, dense_mask, token_kinds


@dataclass
class CausalSegments:
    """Right-padded runs of places that are causal in themselves.

    places: [segments, length] int64. source, target: [rows] int64; result row `source` (in segments x length) belongs to place `target`.
    """

    places: Tensor
    source: Tensor
    target: Tensor


@dataclass
class ImageRows:
    """V or Z rows and the keys they share. queries: [images, Q], keys: [images, L] int64.

    mask: None or bool broadcastable to [images, 1, Q, L]. own: queries also see their own key, which is not among `keys`.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    own: bool = False


@dataclass
class AttentionPlan:
    """What the split does for one micro-batch: index tensors only. Places count column-major: column * rows + row."""

    segments: list[CausalSegments] = field(default_factory=list)
    image_rows: list[ImageRows] = field(default_factory=list)

    def to(self, device: torch.device) -> "AttentionPlan":
        def move(part):
            return type(part)(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(part).items()})

        return AttentionPlan([move(s) for s in self.segments], [move(r) for r in self.image_rows])


def _pad(runs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Runs of places -> right-padded [runs, longest] and the bool mask of what is real."""
    lengths = torch.tensor([len(run) for run in runs])
    real = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    padded = torch.zeros(real.shape, dtype=torch.int64)
    padded[real] = torch.cat(runs)
    return padded, real


def _causal(runs: list[Tensor], wanted: Tensor) -> CausalSegments:
    """Segments whose results are used at the places marked in `wanted` [places] bool."""
    places, real = _pad(runs)
    used = real & wanted[places]
    return CausalSegments(places, used.reshape(-1).nonzero().squeeze(-1), places[used])


def plan_attention(layout: SequenceLayout, rule: MaskRule) -> AttentionPlan:
    """The split of `dense_mask(layout, rule)` into fused calls."""
    kind, sample, image, first_voco = (t.reshape(-1) for t in token_kinds(layout))
    num_visual, num_voco = layout.image.num_visual, layout.image.num_voco
    is_text, is_language = kind == TEXT, (kind != PADDING) & (image < 0)
    compressed = rule.mask != "none"
    language = is_language.clone()
    if layout.num_images:
        language[layout.voco_places] = True

    whole, text_runs = [], []
    for row, start, stop in layout.samples.tolist():
        places = torch.arange(row * layout.seq_length + start, row * layout.seq_length + stop)
        whole.append(places)
        seen = places[language[places]] if compressed else places
        cut = row * layout.seq_length + int(first_voco[places[0]]) if rule.text_sees == "voco_on" else -1
        text_runs += [run for run in (seen[seen < cut], seen[seen >= cut]) if is_text[run].any()]

    prefixes = []
    for index, start in layout.images.tolist():
        row, first, _ = layout.samples[index].tolist()
        before = torch.arange(row * layout.seq_length + first, row * layout.seq_length + start)
        prefixes.append(before[language[before]] if rule.image_sees == "prefix" else before[:0])
    images = list(layout.image_places)

    plan = AttentionPlan()
    if rule.mask == "none" and rule.image_sees == "prefix":
        if whole:
            plan.segments.append(_causal(whole, torch.ones_like(is_text)))
    else:
        if text_runs:
            plan.segments.append(_causal(text_runs, is_text))
        if images and rule.mask == "star":
            plan.image_rows += _star_rows(layout, prefixes, num_visual, num_voco)
        elif images:
            runs = [torch.cat([prefix, own]) for prefix, own in zip(prefixes, images, strict=True)]
            own = torch.zeros_like(is_text)
            own[layout.image_places] = True
            plan.segments += [_causal_of_image(runs, layout.image.length)]

    turn = _column_major(layout)
    for segments in plan.segments:
        segments.places, segments.target = turn[segments.places], turn[segments.target]
    for rows in plan.image_rows:
        rows.queries, rows.keys = turn[rows.queries], turn[rows.keys]
    return plan


def _causal_of_image(runs: list[Tensor], length: int) -> CausalSegments:
    """Segments [prefix; V_i; Z_i] of which the last `length` rows are used."""
    places, real = _pad(runs)
    column, size = torch.arange(places.shape[1])[None], real.sum(1, keepdim=True)
    used = real & (column >= size - length)
    return CausalSegments(places, used.reshape(-1).nonzero().squeeze(-1), places[used])


def _star_rows(layout: SequenceLayout, prefixes: list[Tensor], num_visual: int, num_voco: int) -> list[ImageRows]:
    inside = torch.ones(num_voco, num_visual + num_voco, dtype=torch.bool).tril(num_visual)
    if not any(len(prefix) for prefix in prefixes):
        mask = inside if num_voco > 1 else None  # one voco row sees every key of its image
        return [ImageRows(layout.voco_places, layout.image_places, mask)]
    before, real = _pad(prefixes)
    real = real[:, None, None, :]
    mask = torch.cat([real.expand(-1, 1, num_voco, -1), inside.expand(len(prefixes), 1, -1, -1)], -1)
    return [
        ImageRows(layout.voco_places, torch.cat([before, layout.image_places], 1), mask),
        ImageRows(layout.visual_places, before, real, own=True),
    ]


def _column_major(layout: SequenceLayout) -> Tensor:
    """Place row * seq_length + column -> column * rows + row: mcore's tensors are [seq_length, rows, ...]."""
    return torch.arange(layout.rows * layout.seq_length).view(layout.seq_length, layout.rows).T.reshape(-1)


def split_attention(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Attention under M_hy by its exact split.

    query: [s, b, heads, d]; key, value: [s, b, groups, d], groups dividing heads; rotary already applied.
    Returns [s, b, heads * d].
    """
    s, b, heads, d = query.shape
    repeat = heads // key.shape[2]
    query, key, value = query.reshape(s * b, heads, d), key.reshape(s * b, -1, d), value.reshape(s * b, -1, d)

    def take(x: Tensor, places: Tensor, times: int = 1) -> Tensor:
        """[n, l] places -> [n, heads, l, d]"""
        return x[places].repeat_interleave(times, 2).transpose(1, 2) if times > 1 else x[places].transpose(1, 2)

    results, targets = [], []
    for part in plan.segments:
        q, k, v = take(query, part.places), take(key, part.places, repeat), take(value, part.places, repeat)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        results.append(out.transpose(1, 2).reshape(-1, heads, d)[part.source])
        targets.append(part.target)
    for part in plan.image_rows:
        q, k, v = take(query, part.queries), take(key, part.keys, repeat), take(value, part.keys, repeat)
        if part.own:
            out = _shared_and_own(q, k, v, take(key, part.queries, repeat), take(value, part.queries, repeat), part.mask, scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=part.mask, scale=scale)
        results.append(out.transpose(1, 2).reshape(-1, heads, d))
        targets.append(part.queries.reshape(-1))

    own = value.repeat_interleave(repeat, 1) if repeat > 1 else value  # star's V rows, and padding
    if results:
        own = own.index_copy(0, torch.cat(targets), torch.cat(results).to(own.dtype))
    return own.reshape(s, b, heads * d)


def _shared_and_own(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Each query sees the shared keys that `mask` allows and its own key. All [n, heads, l, d]; softmax in fp32 at least."""
    precise = torch.promote_types(q.dtype, torch.float32)
    shared = (q @ k.transpose(-1, -2)).to(precise) * scale
    shared = shared.masked_fill(~mask, float("-inf"))
    own = (q * own_k).sum(-1, keepdim=True).to(precise) * scale
    weight = torch.cat([shared, own], -1).softmax(-1).to(v.dtype)
    return weight[..., :-1] @ v + weight[..., -1:] * own_v


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The reference: SDPA with a [b, s, s] bool mask. Shapes as in `split_attention`."""
    s, b, heads, d = query.shape
    repeat = heads // key.shape[2]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale)
    return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)


@dataclass
class LayoutParams(PackedSeqParams):
    """Carries a micro-batch's layout to every attention layer by mcore's own parameter for packed sequences."""

    plan: AttentionPlan | None = None
    mask: Tensor | None = None

    @classmethod
    def from_layout(cls, layout: SequenceLayout, rule: MaskRule, attention: str, device: torch.device) -> "LayoutParams":
        """attention: split | dense."""
        if attention == "dense":
            return cls(qkv_format="sbhd", mask=dense_mask(layout, rule).to(device))
        return cls(qkv_format="sbhd", plan=plan_attention(layout, rule).to(device))


class LayoutAttention(nn.Module):
    """Core attention of the backbone's layers under M_hy; refuses to run without a layout."""

    def __init__(self, config, layer_number, attn_mask_type=None, attention_type="self", softmax_scale=None, **_):
        super().__init__()
        if attention_type != "self":
            raise ValueError(f"LayoutAttention is self-attention only, not {attention_type!r}")
        self.scale = softmax_scale or config.softmax_scale or config.kv_channels**-0.5

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None, packed_seq_params=None) -> Tensor:
        """query: [s, b, heads, d]; key, value: [s, b, groups, d] -> [s, b, heads * d], all local to this TP rank."""
        if not isinstance(packed_seq_params, LayoutParams):
            raise RuntimeError("attention was called without the micro-batch's layout: the mask would be lost")
        if attention_mask is not None or attention_bias is not None:
            raise RuntimeError("attention takes its mask from the layout alone, but a mask tensor was passed")
        if packed_seq_params.mask is not None:
            return dense_attention(query, key, value, packed_seq_params.mask, self.scale)
        return split_attention(query, key, value, packed_seq_params.plan, self.scale)


class FullAttention(nn.Module):
    """Core attention of the vision tower: every token sees every token of its image."""

    def __init__(self, config, layer_number, attn_mask_type=None, attention_type="self", softmax_scale=None, **_):
        super().__init__()
        self.scale = softmax_scale or config.softmax_scale or config.kv_channels**-0.5

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None, packed_seq_params=None) -> Tensor:
        """query, key, value: [s, b, heads, d] -> [s, b, heads * d]."""
        s, b, heads, d = query.shape
        out = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), scale=self.scale)
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)

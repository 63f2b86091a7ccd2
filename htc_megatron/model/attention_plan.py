"""What the split of M_hy into fused calls does for one micro-batch, as index tensors (the calls are in attention.py)."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from htc_megatron.model.layout import SequenceLayout
from htc_megatron.model.mask import PADDING, TEXT, MaskRule, token_kinds
from htc_megatron.model.rows import RowOrder

SHORTEST = 64  # segments are padded to at most the next power of two, and to this at least


@dataclass
class CausalSegments:
    """Right-padded runs of rows that are causal in themselves.

    rows: [segments, length] int64, 0 where there is padding. real: [m] int64, which of these, flat, are no padding.
    source, target: [r] int64; result `source` (of the flat ones) belongs to row `target`.
    repeats: whether a row may occur in several of them.
    """

    rows: Tensor
    real: Tensor
    source: Tensor
    target: Tensor
    repeats: bool = False


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
    """What the split does for one micro-batch: index tensors only.

    text: segments that give every text row (and all else, where the mask is plain causal). image_segments, image_rows: V and Z.
    text_sees_images: whether text reads V_hy; if not, `text` indexes the language zone alone, and `text_order`, where it is not
    None, puts its results in the zone's order.
    own_image_only: V_hy sees only itself and Z_i only image i, so V rows have no queries and nothing is listed for V and Z.
    """

    order: RowOrder
    text: list[CausalSegments] = field(default_factory=list)
    image_segments: list[CausalSegments] = field(default_factory=list)
    image_rows: list[ImageRows] = field(default_factory=list)
    text_sees_images: bool = False
    own_image_only: bool = False
    text_order: Tensor | None = None
    voco_mask: Tensor | None = None  # [K, N + K] bool where K > 1

    def to(self, device: torch.device) -> "AttentionPlan":
        def move(value):
            if isinstance(value, list):
                return [type(part)(**{k: move(v) for k, v in vars(part).items()}) for part in value]
            return value.to(device) if isinstance(value, Tensor) else value

        return replace(self, **{name: move(value) for name, value in vars(self).items() if name != "order"})


def _pad(runs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Runs of rows -> right-padded [runs, longest] and the bool mask of what is real."""
    lengths = torch.tensor([len(run) for run in runs])
    real = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    padded = torch.zeros(real.shape, dtype=torch.int64)
    padded[real] = torch.cat(runs)
    return padded, real


def _causal(runs: list[Tensor], wanted: Tensor) -> list[CausalSegments]:
    """Segments whose results are used at the rows marked in `wanted` [rows] bool; runs of like length together."""
    classes: dict[int, list[Tensor]] = {}
    for run in runs:
        classes.setdefault((max(len(run), SHORTEST) - 1).bit_length(), []).append(run)
    found = []
    for _, members in sorted(classes.items()):
        rows, real = _pad(members)
        used = real & wanted[rows]
        source, mine = (mask.reshape(-1).nonzero().squeeze(-1) for mask in (used, real))
        found.append(CausalSegments(rows, mine, source, rows[used]))
    return found


def plan_attention(layout: SequenceLayout, rule: MaskRule, order: RowOrder | None = None) -> AttentionPlan:
    """The split of `dense_mask(layout, rule)` into fused calls."""
    order = RowOrder.of(layout) if order is None else order
    kind, _, image, first_voco = (t.reshape(-1) for t in token_kinds(layout))
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

    row_of = order.row_of

    def segments_of(runs: list[Tensor], wanted: Tensor) -> list[CausalSegments]:
        at_rows = torch.zeros(len(order.places), dtype=torch.bool)
        at_rows[row_of[wanted.nonzero().squeeze(-1)]] = True
        return _causal([row_of[run] for run in runs], at_rows)

    plan = AttentionPlan(order, text_sees_images=not compressed)
    if rule.mask == "none" and rule.image_sees == "prefix":
        plan.text = segments_of(whole, kind != PADDING) if whole else []
        return plan
    plan.text = segments_of(text_runs, is_text) if text_runs else []
    if len(plan.text) > 1:
        plan.text_order = torch.cat([part.target for part in plan.text]).argsort()
    if rule.mask == "star" and rule.image_sees == "own":
        plan.own_image_only = True
        plan.voco_mask = _inside(num_visual, num_voco) if num_voco > 1 else None
    elif images and rule.mask == "star":
        plan.image_rows += _star_rows(layout, prefixes)
        for rows in plan.image_rows:
            rows.queries, rows.keys = row_of[rows.queries], row_of[rows.keys]
    elif images:
        runs = [torch.cat([prefix, own]) for prefix, own in zip(prefixes, images, strict=True)]
        plan.image_segments = _causal_of_images([row_of[run] for run in runs], layout.image.length)
    return plan


def _causal_of_images(runs: list[Tensor], length: int) -> list[CausalSegments]:
    """Segments [prefix; V_i; Z_i] of which the last `length` rows are used."""
    found = []
    for part in _causal(runs, torch.ones(max(int(run.max()) for run in runs) + 1, dtype=torch.bool)):
        size = torch.zeros(part.rows.numel(), dtype=torch.int64)
        size[part.real] = 1
        size = size.view(part.rows.shape).sum(1, keepdim=True)
        column = torch.arange(part.rows.shape[1])[None]
        used = (column < size) & (column >= size - length)
        found.append(CausalSegments(part.rows, part.real, used.reshape(-1).nonzero().squeeze(-1), part.rows[used], repeats=True))
    return found


def _inside(num_visual: int, num_voco: int) -> Tensor:
    """What K voco rows see of their image. [K, N + K] bool."""
    return torch.ones(num_voco, num_visual + num_voco, dtype=torch.bool).tril(num_visual)


def _star_rows(layout: SequenceLayout, prefixes: list[Tensor]) -> list[ImageRows]:
    """Z rows and V rows, both with what stands before their image. In places."""
    inside = _inside(layout.image.num_visual, layout.image.num_voco)
    if not any(len(prefix) for prefix in prefixes):
        return [ImageRows(layout.voco_places, layout.image_places, inside)]
    before, real = _pad(prefixes)
    real = real[:, None, None, :]
    mask = torch.cat([real.expand(-1, 1, layout.image.num_voco, -1), inside.expand(len(prefixes), 1, -1, -1)], -1)
    return [
        ImageRows(layout.voco_places, torch.cat([before, layout.image_places], 1), mask),
        ImageRows(layout.visual_places, before, real, own=True),
    ]

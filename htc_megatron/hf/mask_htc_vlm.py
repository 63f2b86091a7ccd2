"""Who may attend to whom: the sequence an image is expanded into, the mask rule, and the cache that keeps no V_hy.

A sample is [text; V_hy; voco; text; V_hy; voco; ...]; V_hy is an image's anchors and patches. With mask star or full,
input_ids hold K placeholders an image, its voco tokens, and V_hy is inserted in front of them; once voco is computed nobody
reads V_hy again. With mask none input_ids hold N + K placeholders and everything stays.
RoPE positions are those of the whole, uncompressed sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

PADDING, TEXT, VISUAL, VOCO = 0, 1, 2, 3
KIND, IMAGE, PLACE, POSITION, AFTER = range(5)


@dataclass
class Tokens:
    """What the rule must know of each token: `data` [5, batch, n] int64.

    kind: one of the four above. image: number of its image, -1 for none. place: order in the expanded sequence.
    position: for RoPE. after: position of the token that follows.
    """

    data: Tensor

    @property
    def kind(self) -> Tensor:
        return self.data[KIND]

    @property
    def image(self) -> Tensor:
        return self.data[IMAGE]

    @property
    def place(self) -> Tensor:
        return self.data[PLACE]

    @property
    def position(self) -> Tensor:
        return self.data[POSITION]

    def take(self, columns: Tensor) -> "Tokens":
        """The tokens at `columns` [batch, m]."""
        return Tokens(self.data.gather(2, columns.expand(5, -1, -1)))


@dataclass
class Expansion:
    """input_ids [batch, length] with every image's V_hy in its place.

    tokens: of the expanded rows [batch, n], padded at the end. column: [batch, length], where each of input_ids stands.
    visual: (rows [images], columns [images, N]) of V_hy, in order of the images.
    """

    tokens: Tokens
    column: Tensor
    visual: tuple[Tensor, Tensor]

    @property
    def num_images(self) -> int:
        return len(self.visual[0])


def visual_offsets(config: PreTrainedConfig) -> tuple[Tensor, int]:
    """RoPE positions of V_hy and voco relative to the image's first [N + K], and how many positions an image takes."""
    anchors, patches, voco = config.anchors_per_image, config.patches_per_image, config.num_voco_tokens
    if config.fusion == "parallel":  # both channels run over the patches' positions, the anchors spread evenly
        span = patches
        visual = torch.cat([torch.arange(anchors) * patches // max(anchors, 1), torch.arange(patches)])
    else:
        span = anchors + patches
        visual = torch.arange(span)
    return torch.cat([visual, span + torch.arange(voco)]), span + voco


def placeholders(config: PreTrainedConfig, input_ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where input_ids hold an image's placeholder [batch, length] bool, which of its run it is, and images a row [batch].

    Raises ValueError where placeholders are not whole, unbroken runs.
    """
    run = config.image_seq_length
    hit = (input_ids == config.image_token_id) & real
    count = hit.sum(1)
    if (count % run).any():
        row = int((count % run).nonzero()[0])
        raise ValueError(f"row {row} of input_ids has {int(count[row])} image placeholders; wanted a multiple of {run}, an image's share")
    within = (hit.cumsum(1) - 1) % run
    before = torch.nn.functional.pad(hit[:, :-1], (1, 0))
    broken = hit & (within > 0) & ~before
    if broken.any():
        row, column = broken.nonzero()[0].tolist()
        raise ValueError(f"row {row} of input_ids breaks an image's run of {run} placeholders at column {column}; wanted them side by side")
    return hit, within, count // run


def expand(config: PreTrainedConfig, input_ids: Tensor, real: Tensor, cache: "VocoCache | None" = None) -> Expansion:
    """Layout of input_ids [batch, length] behind what `cache` holds. `real`: [batch, length] bool, False at padding."""
    batch, length = input_ids.shape
    device, visual = input_ids.device, config.visual_per_image
    hit, within, images = placeholders(config, input_ids, real)
    inserted = 0 if config.mask == "none" else visual
    slot = within + inserted  # which of V_hy and voco a placeholder is
    starts = hit & (within == 0)
    offsets, span = visual_offsets(config)
    offsets = offsets.to(device)

    advance = real.long().masked_fill(hit, 0).masked_fill(starts, span)
    after = advance.cumsum(1)
    first_image = 0
    first_place = 0
    if cache is not None and cache.tokens is not None:
        after = after + cache.tokens.data[AFTER, :, -1:]
        first_image, first_place = cache.num_images, cache.num_places
    number = first_image + (images.cumsum(0) - images)[:, None] + starts.cumsum(1) - 1
    position = torch.where(hit, after - span + offsets[slot.clamp(max=len(offsets) - 1)], after - advance)
    kind = torch.where(hit, torch.where(slot < visual, VISUAL, VOCO), TEXT).masked_fill(~real, PADDING)

    width = torch.ones_like(input_ids).masked_fill(starts, 1 + inserted)
    column = width.cumsum(1) - 1
    total = int(width.sum(1).max()) if input_ids.numel() else 0
    data = torch.zeros(5, batch, total, dtype=torch.long, device=device)
    data[IMAGE] = -1
    data[PLACE] = first_place + torch.arange(total, device=device)
    for field, values in ((KIND, kind), (IMAGE, number.masked_fill(~hit, -1)), (POSITION, position), (AFTER, after)):
        data[field].scatter_(1, column, values)

    rows, where = starts.nonzero(as_tuple=True)
    columns = (column[rows, where] - inserted)[:, None] + torch.arange(visual, device=device)
    if inserted and len(rows):
        at = rows[:, None].expand_as(columns)
        data[KIND, at, columns] = VISUAL
        data[IMAGE, at, columns] = number[rows, where][:, None].expand_as(columns)
        data[POSITION, at, columns] = (after[rows, where] - span)[:, None] + offsets[:visual]
    return Expansion(Tokens(data), column, (rows, columns))


def allowed(config: PreTrainedConfig, q: Tokens, k: Tokens) -> Tensor:
    """The rule, spelled out: True where query may attend to key. [batch, queries, keys] bool.

    The keys hold every voco token the queries' samples have so far. Padding sees itself, so that no softmax is empty.
    """
    none, prefix = config.mask == "none", config.image_sees == "prefix"
    far = torch.iinfo(torch.long).max
    first_voco = torch.where(k.kind == VOCO, k.place, far).amin(1)[:, None, None]
    q_kind, q_image, q_place = (x[:, :, None] for x in (q.kind, q.image, q.place))
    k_kind, k_image, k_place = (x[:, None, :] for x in (k.kind, k.image, k.place))

    language = (k_kind == TEXT) | (k_kind == VOCO)
    own = (q_image == k_image) & (k_kind != TEXT)
    text = language if config.text_sees == "all" else language & ((q_place < first_voco) | (k_place >= first_voco))
    text = text | ((k_kind == VISUAL) & none)
    before = language & ~own & prefix  # text and voco in front of the image
    others = (k_kind == VISUAL) & ~own & (none and prefix)
    visual = (own & (k_kind == VISUAL) & (config.mask != "star")) | before | others
    voco = own | before | others

    rule = torch.where(q_kind == TEXT, text, torch.where(q_kind == VISUAL, visual, voco))
    rule = rule & (q_kind != PADDING) & (k_kind != PADDING) & (k_place <= q_place)
    return rule | (q_place == k_place)


class VocoCache(DynamicCache):
    """Keys and values of text and voco tokens. V_hy passes through each layer's attention once and is not kept.

    It knows its entries (`tokens`), so more text, and more images, can follow. Its length is that of input_ids.
    """

    def __init__(self, config: PreTrainedConfig | None = None):
        super().__init__(config=config)
        self.tokens: Tokens | None = None
        self.num_images = 0
        self.num_places = 0
        self._kept: Tensor | None = None

    def extend(self, expansion: Expansion) -> Tokens:
        """Prepare for a pass over `expansion`; returns the keys its queries meet: all entries, then all expanded tokens."""
        new, past = expansion.tokens, self.tokens
        kept = new.take(expansion.column)
        whole = expansion.column.shape[1] == new.data.shape[2]
        self._kept = None if whole else expansion.column[:, None, :, None]
        self.num_images += expansion.num_images
        self.num_places += new.data.shape[2]
        self.tokens = kept if past is None else Tokens(torch.cat([past.data, kept.data], 2))
        return new if past is None else Tokens(torch.cat([past.data, new.data], 2))

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """[batch, heads, expanded, head_dim] each; returns those of the entries and of the whole expansion."""
        if self._kept is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        past = (layer.keys, layer.values) if layer is not None and layer.is_initialized else (None, None)
        seen, kept = [], []
        for old, new in zip(past, (key_states, value_states), strict=True):
            seen.append(new if old is None else torch.cat([old, new], dim=2))
            kept.append(new.gather(2, self._kept.expand(-1, new.shape[1], -1, new.shape[3])))
        super().update(*kept, layer_idx, *args, **kwargs)
        return seen[0], seen[1]

    def select(self, rows: Tensor) -> "VocoCache":
        """A cache of the given rows [m] of the batch, in this order, repeats allowed; this one stays as it is."""
        chosen = VocoCache()
        for index, layer in enumerate(self.layers):
            super(VocoCache, chosen).update(layer.keys[rows], layer.values[rows], index)
        chosen.tokens = Tokens(self.tokens.data[:, rows])
        chosen.num_images, chosen.num_places = self.num_images, self.num_places
        return chosen

    # What generate() does to a cache, done to `tokens` too.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.tokens = Tokens(self.tokens.data[:, beam_idx.to(self.tokens.data.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.tokens = Tokens(self.tokens.data[:, indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.tokens = Tokens(self.tokens.data.repeat_interleave(repeats, dim=1))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.tokens = Tokens(self.tokens.data[:, :, : -abs(tokens_to_remove)])

    def reset(self) -> None:
        super().reset()
        self.tokens, self.num_images, self.num_places, self._kept = None, 0, 0, None

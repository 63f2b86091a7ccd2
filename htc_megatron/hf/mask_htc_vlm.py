"""Who may attend to whom: the sequence an image is expanded into, and the mask rule.

A sample is [text; V_hy; voco; text; V_hy; voco; ...]; V_hy is an image's anchors and patches. With mask star or full,
input_ids hold K placeholders an image, its voco tokens, and V_hy is inserted in front of them; once voco is computed nobody
reads V_hy again. With mask none input_ids hold N + K placeholders and everything stays. Where an image's keys and values were
computed before (image_htc_vlm.py), nothing is inserted for it.
RoPE positions are those of the whole, uncompressed sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

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
class Behind:
    """What an expansion must know of the tokens in front of it: the position that follows them [batch, 1], images and places used."""

    after: Tensor
    num_images: int
    num_places: int


@dataclass
class Expansion:
    """input_ids [batch, length] with every image's V_hy in its place.

    tokens: of the expanded rows [batch, n], padded at the end. column: [batch, length], where each of input_ids stands.
    visual: (rows [images], columns [images, N]) of V_hy, in order of the images; no columns where V_hy is not inserted.
    first: [images], column of each image's first placeholder in input_ids. start: [images], RoPE position where the image begins.
    """

    tokens: Tokens
    column: Tensor
    visual: tuple[Tensor, Tensor]
    first: Tensor
    start: Tensor

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


def text_token(behind: Behind) -> Expansion:
    """Layout of one token of text in each row [batch, 1]: `expand` for a step of decoding, without a search for images."""
    after = behind.after
    place = torch.full_like(after, behind.num_places)
    data = torch.stack([torch.full_like(after, TEXT), torch.full_like(after, -1), place, after, after + 1])
    none = after.new_empty(0)
    return Expansion(Tokens(data), torch.zeros_like(after), (none, none.view(0, 0)), none, none)


def expand(config: PreTrainedConfig, input_ids: Tensor, real: Tensor, behind: Behind | None = None, known: bool = False) -> Expansion:
    """Layout of input_ids [batch, length] behind others. `real`: [batch, length] bool, False at padding.

    known: the images' keys and values are at hand, so that V_hy is not inserted; positions are the same.
    """
    batch, length = input_ids.shape
    device, visual = input_ids.device, config.visual_per_image
    hit, within, images = placeholders(config, input_ids, real)
    first_slot = 0 if config.mask == "none" else visual
    inserted = 0 if known else first_slot
    slot = within + first_slot  # which of V_hy and voco a placeholder is
    starts = hit & (within == 0)
    offsets, span = visual_offsets(config)
    offsets = offsets.to(device)

    advance = real.long().masked_fill(hit, 0).masked_fill(starts, span)
    after = advance.cumsum(1)
    first_image = 0
    first_place = 0
    if behind is not None:
        after = after + behind.after
        first_image, first_place = behind.num_images, behind.num_places
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
    start = after[rows, where] - span
    columns = (column[rows, where] - inserted)[:, None] + torch.arange(0 if known else visual, device=device)
    if inserted and len(rows):
        at = rows[:, None].expand_as(columns)
        data[KIND, at, columns] = VISUAL
        data[IMAGE, at, columns] = number[rows, where][:, None].expand_as(columns)
        data[POSITION, at, columns] = start[:, None] + offsets[:visual]
    return Expansion(Tokens(data), column, (rows, columns), where, start)


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

"""The order in which the backbone computes rows: text, then voco tokens, then V_hy; nothing is computed at padding.

All but attention works row by row, so the order is free. In this one what only some rows need is a slice: queries under
`star` are those of the rows in front, an image's keys are a view, and rows that nobody reads are cut off at the end.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from htc_megatron.model.layout import ImageShape, SequenceLayout
from htc_megatron.model.mask import TEXT, token_kinds


@dataclass(frozen=True)
class RowOrder:
    """Two zones of rows: language (text in the order of its places, then voco image by image) and visual (V_hy image by image).

    places: [language + visual] int64, row * seq_length + column of each; -1 at rows that fill a zone up.
    num_text, num_images: of the micro-batch. image: parts of one image.
    language, visual: rows of each zone, filling included; multiples of `shares`.
    shares: TP size under sequence parallelism, where each rank holds the same share of both zones; else 1.
    """

    places: Tensor
    num_text: int
    num_images: int
    image: ImageShape
    language: int
    visual: int
    num_places: int
    shares: int = 1

    @classmethod
    def of(cls, layout: SequenceLayout, shares: int = 1) -> "RowOrder":
        kind = token_kinds(layout)[0].reshape(-1)
        text = (kind == TEXT).nonzero().squeeze(-1)
        language = torch.cat([text, layout.voco_places.reshape(-1)])
        visual = layout.visual_places.reshape(-1)
        zones = [_fill(language, max(len(language), 1), shares), _fill(visual, len(visual), shares)]
        sizes = (len(text), layout.num_images, layout.image, len(zones[0]), len(zones[1]))
        return cls(torch.cat(zones), *sizes, layout.rows * layout.seq_length, shares)

    @property
    def num_voco(self) -> int:
        """Voco rows of all images."""
        return self.num_images * self.image.num_voco

    @property
    def num_visual(self) -> int:
        """V_hy rows of all images."""
        return self.num_images * self.image.num_visual

    @property
    def local(self) -> tuple[int, int]:
        """Rows of the language and the visual zone that one rank holds."""
        return self.language // self.shares, self.visual // self.shares

    @cached_property
    def row_of(self) -> Tensor:
        """Row of each place, -1 where nothing is computed. [num_places] int64."""
        rows = torch.full((self.num_places,), -1)
        real = self.places >= 0
        rows[self.places[real]] = torch.arange(len(self.places))[real]
        return rows

    def share_out(self, language: Tensor, visual: Tensor) -> Tensor:
        """Both zones, rows first, in the order in which equal parts of the first dimension are the ranks' shares."""
        if self.shares == 1 or not self.visual:
            return torch.cat([language, visual])
        parts = [zone.view(self.shares, -1, *zone.shape[1:]) for zone in (language, visual)]
        return torch.cat(parts, 1).flatten(0, 1)

    def gathered(self, rows: Tensor) -> Tensor:
        """Undo `share_out`: rows in the ranks' order to [language + visual, ...] in this order."""
        if self.shares == 1 or not self.visual:
            return rows
        parts = rows.view(self.shares, -1, *rows.shape[1:]).split(self.local, 1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    def at_places(self, rows: Tensor) -> Tensor:
        """Rows [language + visual, ...] put at their places, zeros where nothing is computed: [num_places, ...]."""
        found = rows.new_zeros(self.num_places, *rows.shape[1:])
        real = (self.places >= 0).to(rows.device)
        return found.index_copy(0, self.places.to(rows.device)[real], rows[real])


def capacity(rows: int, seq_length: int, shares: int = 1) -> int:
    """Rows that any micro-batch of this shape fits into: what pipeline stages send each other, whatever it holds."""
    return rows * seq_length + (2 * shares if shares > 1 else 0)


def fill_up(hidden: Tensor, size: int) -> Tensor:
    """[n, ...] with zero rows behind, [size, ...]."""
    return F.pad(hidden, [0, 0] * (hidden.ndim - 1) + [0, size - len(hidden)])


def _fill(places: Tensor, size: int, shares: int) -> Tensor:
    wanted = -(-size // shares) * shares
    return F.pad(places, (0, wanted - len(places)), value=-1)


def wanted_rows(order: RowOrder, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose outputs predict a supervised token, and the tokens: [n] int64 each, in order of places.

    labels: [rows, seq_length] aligned with the input, -100 where there is no loss, so the row before each label predicts it.
    """
    following = torch.full_like(labels, -100)
    following[:, :-1] = labels[:, 1:]
    following = following.reshape(-1)
    supervised = (following != -100).nonzero().squeeze(-1)
    rows = order.row_of[supervised]
    if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= order.language):
        raise ValueError("labels: a supervised token stands behind padding or inside an image: no text or voco token predicts it")
    return rows, following[supervised]

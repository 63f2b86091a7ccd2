"""The cache that keeps no V_hy: keys and values of text and voco tokens, written into tensors made once for the whole answer.

It knows its entries, so more text, and more images, can follow. A token of text behind it sees a row of entries that changes only
by what is added, so that a step of decoding makes no mask.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from .mask_htc_vlm import AFTER, Behind, Expansion, Tokens, allowed


@dataclass
class KnownImages:
    """Keys and values that stand in for what a pass computes at placeholders, the keys turned to where the images begin.

    rows: [images]. columns: [images, run]. keys, values: [images, layers, heads, run, head_dim].
    """

    rows: Tensor
    columns: Tensor
    keys: Tensor
    values: Tensor

    def put(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [batch, heads, n, head_dim] with the images' in their places."""
        at = (self.rows[:, None], self.columns)
        put = []
        for computed, known in ((keys, self.keys), (values, self.values)):
            part = known[:, layer].transpose(1, 2).to(computed)
            put.append(computed.transpose(1, 2).index_put(at, part).transpose(1, 2))
        return put[0], put[1]


class RoomyLayer(DynamicLayer):
    """A layer whose keys and values are the filled part of larger tensors, so that a step writes its own entries only.

    capacity: entries to make room for; beyond it, room grows by half.
    """

    def __init__(self, capacity: int = 0):
        super().__init__()
        self.capacity = capacity
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """[batch, heads, new, head_dim] each; returns all entries, the new ones last."""
        filled = self.get_seq_length()
        total = filled + key_states.shape[2]
        graph = torch.is_grad_enabled() and (key_states.requires_grad or (filled > 0 and self.keys.requires_grad))
        if graph or (not filled and total >= self.capacity):
            self._rooms = None
            if filled:
                return super().update(key_states, value_states, *args, **kwargs)
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._fits(total):
            wanted = max(self.capacity, total + filled // 2)
            self._rooms = tuple(self._room(old, new, wanted, filled) for old, new in ((self.keys, key_states), (self.values, value_states)))
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, filled:total] = new
        self.keys, self.values = (room[:, :, :total] for room in self._rooms)
        return self.keys, self.values

    def _fits(self, total: int) -> bool:
        """Whether the entries are still where the rooms begin (a selection of rows is not) and `total` have a place."""
        if self._rooms is None or self._rooms[0].shape[2] < total:
            return False
        if self._rooms[0].is_inference() and not torch.is_inference_mode_enabled():
            return False
        return all(
            part.data_ptr() == room.data_ptr() and len(part) == len(room)
            for part, room in zip((self.keys, self.values), self._rooms, strict=True)
        )

    @staticmethod
    def _room(old: Tensor, new: Tensor, entries: int, filled: int) -> Tensor:
        room = new.new_empty(*new.shape[:2], entries, new.shape[3])
        if filled:
            room[:, :, :filled] = old
        return room

    def reset(self) -> None:
        super().reset()
        self._rooms = None


class VocoCache(DynamicCache):
    """Keys and values of text and voco tokens. V_hy passes through each layer's attention once and is not kept.

    `tokens` are its entries. Its length is that of input_ids. capacity: entries to make room for at once.
    """

    def __init__(self, capacity: int = 0):
        super().__init__()
        self.capacity = capacity
        self.num_images = 0
        self.num_places = 0
        self._parts: list[Tensor] = []  # of the entries' `Tokens.data`, in order
        self._kept: Tensor | None = None
        self._known: KnownImages | None = None
        self._text_sees: Tensor | bool | None = None  # [batch, >= entries] bool; True: all; None: not made yet

    @property
    def tokens(self) -> Tokens | None:
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts, 2)]
        return Tokens(self._parts[0]) if self._parts else None

    @tokens.setter
    def tokens(self, tokens: Tokens | None) -> None:
        self._parts = [] if tokens is None else [tokens.data]
        self._text_sees = None

    @property
    def behind(self) -> Behind | None:
        """What the next expansion must know; None of an empty cache."""
        return Behind(self._parts[-1][AFTER, :, -1:], self.num_images, self.num_places) if self._parts else None

    def extend(self, config: PreTrainedConfig, expansion: Expansion, known: KnownImages | None = None) -> Tensor:
        """Prepare for a pass over `expansion`; returns its mask [batch, queries, keys] bool: all entries, then all expanded tokens."""
        new, past = expansion.tokens, self.tokens
        mask = allowed(config, new, new if past is None else Tokens(torch.cat([past.data, new.data], 2)))
        kept = new.take(expansion.column)
        whole = expansion.column.shape[1] == new.data.shape[2]
        self._kept = None if whole else expansion.column[:, None, :, None]
        self._known = known
        self.num_images += expansion.num_images
        self.num_places += new.data.shape[2]
        self._parts.append(kept.data)
        self._text_sees = None
        return mask

    def extend_by_text(self, config: PreTrainedConfig, expansion: Expansion) -> Tensor | None:
        """As `extend` for one real token of text in each row; None where it sees every entry."""
        if self._text_sees is None:
            mask = self.extend(config, expansion)
            everything = bool(mask.all())
            self._text_sees = True if everything else mask[:, 0]
            return None if everything else mask
        self._kept = self._known = None
        self.num_places += 1
        self._parts.append(expansion.tokens.data)
        if self._text_sees is True:
            return None
        length = self.get_seq_length() + 1
        if self._text_sees.shape[1] < length:
            more = max(self.capacity, length + length // 2) - self._text_sees.shape[1]
            self._text_sees = torch.nn.functional.pad(self._text_sees, (0, more), value=True)
        return self._text_sees[:, None, :length]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """[batch, heads, expanded, head_dim] each; returns those of the entries and of the whole expansion."""
        while len(self.layers) <= layer_idx:
            self.layers.append(RoomyLayer(self.capacity))
        if self._known is not None:
            key_states, value_states = self._known.put(key_states, value_states, layer_idx)
        if self._kept is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        past = (layer.keys, layer.values) if layer.is_initialized else (None, None)
        seen, kept = [], []
        for old, new in zip(past, (key_states, value_states), strict=True):
            seen.append(new if old is None else torch.cat([old, new], dim=2))
            kept.append(new.gather(2, self._kept.expand(-1, new.shape[1], -1, new.shape[3])))
        super().update(*kept, layer_idx, *args, **kwargs)
        return seen[0], seen[1]

    def reserve(self, capacity: int) -> None:
        """Make room for so many entries when the next ones are written."""
        self.capacity = capacity
        for layer in self.layers:
            layer.capacity = capacity

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
        self.tokens, self.num_images, self.num_places, self._kept, self._known = None, 0, 0, None, None

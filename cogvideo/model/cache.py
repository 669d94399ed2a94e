"""Static key-value caches for stepping.

What a token sees is always one slice of its channel's cache (`Layout.segments`), so a step copies nothing: it
writes its own key and value and reads a view. The spatial channel keeps the text and the frames under way
only.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from cogvideo.layout import Layout

Channel = Literal["spatial", "temporal"]


class ChannelCache:
    """Keys and values of one channel, [2, B * H, slots, d] for each layer; odd layers may use shifted
    windows.

    sizes: layers, batch, heads, width of a head; `like` has the device and dtype of what is kept.
    """

    def __init__(self, layout: Layout, channel: Channel, window: int, sizes: tuple[int, ...], like: Tensor):
        layers, batch, self.heads, width = sizes
        self.text_len = layout.text_len
        self.segments = [layout.segments(channel, window, shifted) for shifted in (False, True)]
        self.slots = [torch.tensor(one.slot, device=like.device) for one in self.segments]
        self.starts = [sorted(set(one.start)) for one in self.segments]
        shapes = [(2, batch * self.heads, max(one.slot) + 1, width) for one in self.segments]
        self.kept = [like.new_zeros(shapes[layer % 2]) for layer in range(layers)]

    @property
    def longest(self) -> int:
        """The most keys that one token sees."""
        return max(end - start for one in self.segments for start, end in zip(one.start, one.end))

    def rows(self, first: int, count: int) -> "ChannelCache":
        """The cache of some rows of the batch, in the same memory."""
        some = copy(self)
        some.kept = [kept.narrow(1, first * self.heads, count * self.heads) for kept in self.kept]
        return some

    def write_text(self, layer: int, kv: Tensor) -> None:
        """Keys and values [2, B, H, T, d] to the front of every segment."""
        kv = kv.flatten(1, 2)
        for start in self.starts[layer % 2]:
            self.kept[layer].narrow(2, start, self.text_len).copy_(kv)

    def write(self, layer: int, kv: Tensor) -> None:
        """Keys and values [2, B, H, S, d] of the first S laid places."""
        self.kept[layer].index_copy_(2, self.slots[layer % 2][: kv.shape[3]], kv.flatten(1, 2))

    def append(self, layer: int, places: Sequence[int], kv: Tensor) -> Tensor:
        """Write [2, B * H, m, d] of places that see the same, and return all that they see,
        [2, B * H, seen, d]."""
        one, place = self.segments[layer % 2], places[0]
        self.kept[layer].narrow(2, one.slot[place], len(places)).copy_(kv)
        return self.kept[layer].narrow(2, one.start[place], one.end[place] - one.start[place])

    def split(self, places: Sequence[int]) -> list[list[list[int]]]:
        """The places of a step, grouped by what they see: in even layers, and in odd ones."""
        found = []
        for one in self.segments:
            alike = groupby(places, key=lambda place: (one.start[place], one.end[place]))
            found.append([list(group) for _, group in alike])
        return found


@dataclass
class Cache:
    """All that stepping remembers: the channels, and what the prompt leaves for the steps."""

    channels: dict[Channel, ChannelCache]
    positions: Tensor  # [F * N, D] position embeddings in laid order
    bias: Tensor  # [B * H, 1, L] added to scores: text first, zeros after
    turns: Tensor | None = None  # [2, F * N, d] rotations of queries and keys in laid order

    def rows(self, first: int, count: int) -> "Cache":
        """The cache of some rows of the batch, in the same memory."""
        heads = self.heads
        channels = {name: channel.rows(first, count) for name, channel in self.channels.items()}
        return replace(self, channels=channels, bias=self.bias.narrow(0, first * heads, count * heads))

    @property
    def heads(self) -> int:
        return self.channels["spatial"].heads

    def write(self, channel: Channel, layer: int, qkv: Tensor) -> None:
        """Keys and values of a prompt, of [3, B, H, T + S, d] of one channel and layer."""
        one = self.channels[channel]
        text, frames = qkv.tensor_split((one.text_len,), 3)
        one.write_text(layer, text[1:])
        one.write(layer, frames[1:])

    def write_bias(self, bias: Tensor) -> None:
        """What is added to scores towards text, [B, T]."""
        self.bias[:, 0, : bias.shape[1]] = bias.repeat_interleave(self.heads, 0)

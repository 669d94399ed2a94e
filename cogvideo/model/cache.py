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

    sizes: layers, batch, heads, width of a head; `like` has the device and dtype of the cache.
    """

    def __init__(self, layout: Layout, channel: Channel, window: int, sizes: tuple[int, ...], like: Tensor):
        layers, batch, self.heads, width = sizes
        self.text_len = layout.text_len
        self.segments = [layout.segments(channel, window, shifted) for shifted in (False, True)]
        self.slots = [torch.tensor(segments.slot, device=like.device) for segments in self.segments]
        self.starts = [sorted(set(segments.start)) for segments in self.segments]
        shapes = [(2, batch * self.heads, max(segments.slot) + 1, width) for segments in self.segments]
        self.kv = [like.new_zeros(shapes[layer % 2]) for layer in range(layers)]

    @property
    def longest(self) -> int:
        """The most keys that one token sees."""
        lengths = []
        for segments in self.segments:
            lengths += [end - start for start, end in zip(segments.start, segments.end)]
        return max(lengths)

    def rows(self, first: int, count: int) -> "ChannelCache":
        """The cache of some rows of the batch, in the same memory."""
        view = copy(self)
        view.kv = [kv.narrow(1, first * self.heads, count * self.heads) for kv in self.kv]
        return view

    def write_text(self, layer: int, kv: Tensor) -> None:
        """Keys and values [2, B, H, T, d] to the front of every segment."""
        kv = kv.flatten(1, 2)
        for start in self.starts[layer % 2]:
            self.kv[layer].narrow(2, start, self.text_len).copy_(kv)

    def write(self, layer: int, kv: Tensor) -> None:
        """Keys and values [2, B, H, S, d] of the first S laid positions."""
        self.kv[layer].index_copy_(2, self.slots[layer % 2][: kv.shape[3]], kv.flatten(1, 2))

    def append(self, layer: int, positions: Sequence[int], kv: Tensor) -> Tensor:
        """Write [2, B * H, m, d] of positions that see the same, and return all that they see,
        [2, B * H, seen, d]."""
        segments = self.segments[layer % 2]
        first = positions[0]
        start = segments.start[first]
        self.kv[layer].narrow(2, segments.slot[first], len(positions)).copy_(kv)
        return self.kv[layer].narrow(2, start, segments.end[first] - start)

    def split(self, positions: Sequence[int]) -> list[list[list[int]]]:
        """The positions of a step in runs that see the same: in even layers, and in odd ones."""
        runs = []
        for segments in self.segments:
            alike = groupby(positions, key=lambda p: (segments.start[p], segments.end[p]))
            runs.append([list(run) for _, run in alike])
        return runs


@dataclass
class Cache:
    """The state of generation: keys and values of both channels, and tables that every step reads."""

    channels: dict[Channel, ChannelCache]
    positions: Tensor  # [F * N, D] position embeddings in laid order
    bias: Tensor  # [B * H, 1, L] added to scores: text first, zeros after
    rotary: Tensor | None = None  # [2, F * N, d] rotations of queries and keys in laid order

    def rows(self, first: int, count: int) -> "Cache":
        """The cache of some rows of the batch, in the same memory."""
        heads = self.heads
        channels = {name: channel.rows(first, count) for name, channel in self.channels.items()}
        return replace(self, channels=channels, bias=self.bias.narrow(0, first * heads, count * heads))

    @property
    def heads(self) -> int:
        return self.channels["spatial"].heads

    def write(self, channel: Channel, layer: int, qkv: Tensor) -> None:
        """Store the keys and values of a prompt, of [3, B, H, T + S, d] of one channel and layer."""
        cache = self.channels[channel]
        text, frames = qkv.tensor_split((cache.text_len,), 3)
        cache.write_text(layer, text[1:])
        cache.write(layer, frames[1:])

    def write_bias(self, bias: Tensor) -> None:
        """Store the bias on scores towards text, [B, T]."""
        self.bias[:, 0, : bias.shape[1]] = bias.repeat_interleave(self.heads, 0)

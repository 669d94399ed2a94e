"""Static key-value caches for stepping.

What a token sees is always one slice of its channel's cache (`Layout.segments`), so a step copies nothing: it
writes its own key and value and reads a view. The spatial channel keeps the text and the current frame only.
"""

import torch
from torch import Tensor

from cogvideo.layout import Layout


class ChannelCache:
    """Keys and values of one channel: a pair of [B, H, slots, d] for each layer. Odd layers may use shifted
    windows."""

    def __init__(
        self,
        layout: Layout,
        channel: str,
        window: int,
        layers: int,
        batch: int,
        heads: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.text_len = layout.text_len
        self.places = [
            layout.segments(channel, layout.text_len, window, bool(window) and bool(layer % 2))
            for layer in range(min(layers, 2))
        ]
        self.slots = [torch.tensor(slot, device=device) for _, slot in self.places]
        self.starts = [sorted(set(start)) for start, _ in self.places]
        self.keys, self.values = [], []
        for layer in range(layers):
            shape = (batch, heads, max(self.places[layer % 2][1]) + 1, width // heads)
            self.keys.append(torch.zeros(shape, device=device, dtype=dtype))
            self.values.append(torch.zeros(shape, device=device, dtype=dtype))

    def write_text(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [B, H, T, d] to the front of every segment."""
        for start in self.starts[layer % 2]:
            self.keys[layer][:, :, start : start + self.text_len] = k
            self.values[layer][:, :, start : start + self.text_len] = v

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [B, H, S, d] of the first S laid places."""
        slots = self.slots[layer % 2][: k.shape[2]]
        self.keys[layer].index_copy_(2, slots, k)
        self.values[layer].index_copy_(2, slots, v)

    def append(self, layer: int, place: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, H, 1, d] of one place and return all that this place sees, [B, H, seen, d]."""
        starts, slots = self.places[layer % 2]
        start, slot = starts[place], slots[place]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, slot : slot + 1] = k
        values[:, :, slot : slot + 1] = v
        return keys[:, :, start : slot + 1], values[:, :, start : slot + 1]


class Cache:
    """All that stepping remembers: both channels, and what the prompt left for the steps."""

    def __init__(self, spatial: ChannelCache, temporal: ChannelCache | None):
        self.spatial, self.temporal = spatial, temporal
        self.entered = -1  # frame tokens so far; -1 before the prompt
        self.bias: Tensor  # [B, 1, 1, L] added to scores: text first, zeros after
        self.positions: Tensor  # [F * N, D] position embeddings in laid order

"""Static key-value caches for stepping.

What a token sees is always one slice of its channel's cache (`Layout.segments`), so a step copies nothing: it
writes its own key and value and reads a view. The spatial channel keeps the text and the frames under way
only.
"""

import torch
from torch import Tensor

from cogvideo.layout import Layout


class ChannelCache:
    """Keys and values of one channel, [2, B, H, slots, d] for each layer; odd layers may use shifted windows.

    sizes: layers, batch, heads, width of a head; `like` has the device and dtype of what is kept.
    """

    def __init__(self, layout: Layout, channel: str, window: int, sizes: tuple[int, ...], like: Tensor):
        layers, batch, heads, width = sizes
        self.text_len = layout.text_len
        self.places = [layout.segments(channel, window, shifted) for shifted in (False, True)]
        self.slots = [torch.tensor(slot, device=like.device) for _, slot in self.places]
        self.starts = [sorted(set(start)) for start, _ in self.places]
        shapes = [(2, batch, heads, max(slot) + 1, width) for _, slot in self.places]
        self.kept = [like.new_zeros(shapes[layer % 2]) for layer in range(layers)]

    def write_text(self, layer: int, kv: Tensor) -> None:
        """Keys and values [2, B, H, T, d] to the front of every segment."""
        for start in self.starts[layer % 2]:
            self.kept[layer].narrow(3, start, self.text_len).copy_(kv)

    def write(self, layer: int, kv: Tensor) -> None:
        """Keys and values [2, B, H, S, d] of the first S laid places."""
        self.kept[layer].index_copy_(3, self.slots[layer % 2][: kv.shape[3]], kv)

    def append(self, layer: int, place: int, kv: Tensor) -> Tensor:
        """Write [2, B, H, 1, d] of one place and return all that this place sees, [2, B, H, seen, d]."""
        starts, slots = self.places[layer % 2]
        start, slot = starts[place], slots[place]
        self.kept[layer].narrow(3, slot, 1).copy_(kv)
        return self.kept[layer].narrow(3, start, slot + 1 - start)


class Cache:
    """All that stepping remembers: the channels, and what the prompt left for the steps."""

    def __init__(self, channels: list[ChannelCache]):
        self.channels = channels
        self.bias: Tensor  # [B, 1, 1, L] added to scores: text first, zeros after
        self.positions: Tensor  # [F * N, D] position embeddings in laid order

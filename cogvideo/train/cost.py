"""Floating-point operations of a training step of the token models: what must be computed, not what is.

They are arithmetic: for every token, 2 operations for each weight of a matrix in the forward pass, 2 for the
gradient of its input, 2 for its own if it learns; and attention, between tokens that see each other.
Encoding, the optimizer and all that is computed twice or masked afterwards do not count.
"""

from collections.abc import Sequence

from torch import nn

from cogvideo.layout import Layout
from cogvideo.model.transformer import Base, TemporalChannel
from cogvideo.train.inputs import Parts, part


def token_flops(layout: Layout, stage: str, trains: Sequence[str], parts: Parts) -> float:
    """Operations for one clip of this layout, forward and backward. `stage` names the temporal channel, if
    the parts have one; `trains` the parts that learn."""
    c = part(parts, "base", Base).config
    tokens = c.text_len + layout.clip_tokens
    flops = 0.0
    for name in ("base", stage):
        if name in parts:
            linear = [m for m in parts[name].modules() if isinstance(m, nn.Linear)]
            flops += sum(m.weight.numel() for m in linear) * tokens * (6 if name in trains else 4)
    predicted = len(layout.trained) * layout.frame_tokens
    flops += c.codes * c.width * predicted * (6 if "base" in trains else 4)
    pairs = c.layers * (layout.sees("spatial").sum() + (layout.clip_tokens + c.text_len) * c.text_len)
    if stage in parts:
        temporal = part(parts, stage, TemporalChannel)
        for layer in range(c.layers):
            shifted = bool(temporal.window) and layer % 2 == 1
            seen = layout.sees("temporal", temporal.window, shifted)
            pairs += seen.sum() + layout.clip_tokens * c.text_len
    return float(flops + 12.0 * c.width * float(pairs))

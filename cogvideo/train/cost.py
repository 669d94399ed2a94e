"""Floating-point operations of a training step of the token models: what must be computed, not what is.

They are arithmetic: for every token, 2 operations for each weight of a matrix in the forward pass, 2 for the
gradient of its input, 2 for its own if it learns; and attention, between tokens that see each other.
Encoding, the optimizer and all that is computed twice or masked afterwards do not count.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from cogvideo.layout import Layout


def token_flops(layout: Layout, stage: str, trains: Sequence[str], parts: dict[str, Any]) -> float:
    """Operations for one clip of this layout, forward and backward. `stage` names the temporal channel, if
    the parts have one; `trains` the parts that learn."""
    c = parts["base"].config
    temporal = parts.get(stage)
    tokens = c.text_len + layout.tokens
    flops = 0.0
    for part in ("base", stage):
        if part in parts:
            weights = sum(m.weight.numel() for m in parts[part].modules() if isinstance(m, nn.Linear))
            flops += weights * tokens * (6 if part in trains else 4)
    predicted = len(layout.trained) * layout.frame_len
    flops += c.codes * c.width * predicted * (6 if "base" in trains else 4)
    pairs = c.layers * (layout.sees("spatial").sum() + (layout.tokens + c.text_len) * c.text_len)
    if temporal is not None:
        for layer in range(c.layers):
            seen = layout.sees("temporal", temporal.window, bool(temporal.window) and layer % 2 == 1)
            pairs += seen.sum() + layout.tokens * c.text_len
    return float(flops + 12.0 * c.width * float(pairs))

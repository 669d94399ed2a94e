"""Floating-point operations of a training step: those that must be computed, not those that are.

For every token: 2 operations for each weight of a matrix in the forward pass, 2 for the gradient of its
input, 2 for its own gradient if it learns; and attention, between tokens that see each other. Encoding, the
optimizer and all that is computed twice or masked afterwards do not count.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from cogvideo.layout import Layout
from cogvideo.model.transformer import Base, TemporalChannel
from cogvideo.train.inputs import Parts, part

if TYPE_CHECKING:
    from cogvideo.train.phase import Phase


def clip_flops(stage: str, phase: "Phase", parts: Parts) -> float:
    """Operations for one clip of a token model, forward and backward: the average over whole clips and
    windows."""
    layout = part(parts, "base", Base).config.layout(stage)
    whole = _flops(layout, stage, phase, parts)
    if not phase.windowed:
        return whole
    small = _flops(replace(layout, grid=layout.grid // 2), stage, phase, parts)
    return (1 - phase.windowed) * whole + phase.windowed * small


def _flops(layout: Layout, stage: str, phase: "Phase", parts: Parts) -> float:
    c = part(parts, "base", Base).config
    tokens = c.text_len + layout.tokens
    flops = 0.0
    for name in ("base", stage):
        if name in parts:
            linear = [m for m in parts[name].modules() if isinstance(m, nn.Linear)]
            weights = sum(m.weight.numel() for m in linear)
            flops += weights * tokens * (6 if name in phase.trains else 4)
    predicted = len(layout.trained) * layout.frame_len
    flops += c.codes * c.width * predicted * (6 if "base" in phase.trains else 4)

    pairs = c.layers * (layout.sees("spatial").sum() + (layout.tokens + c.text_len) * c.text_len)
    if stage in parts:
        temporal = part(parts, stage, TemporalChannel)
        for layer in range(c.layers):
            shifted = bool(temporal.window) and layer % 2 == 1
            seen = layout.sees("temporal", temporal.window, shifted)
            pairs += seen.sum() + layout.tokens * c.text_len
    return flops + 12.0 * c.width * float(pairs)

"""Floating-point operations of a training step: what must be computed, not what is.

Those of the token models are arithmetic: for every token, 2 operations for each weight of a matrix in the
forward pass, 2 for the gradient of its input, 2 for its own if it learns; and attention, between tokens that
see each other. Encoding, optimizer and all that is computed twice or masked afterwards do not count. Of what
consists of convolutions, the operations of one step are counted as it runs.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from cogvideo.layout import Layout
from cogvideo.train import objectives
from cogvideo.train.phase import Phase


def clip_flops(phase: Phase, parts: dict[str, Any]) -> float | None:
    """Operations for one clip of a phase of the token models, forward and backward, on an average over whole
    clips and windows; None for other phases."""
    stages = {objectives.image: "image", objectives.stage1: "stage1", objectives.stage2: "stage2"}
    if phase.objective not in stages:
        return None
    stage = stages[phase.objective]  # type: ignore[index]
    layout = parts["base"].config.layout(stage)
    whole = _flops(layout, stage, phase, parts)
    if not phase.windowed:
        return whole
    small = _flops(replace(layout, grid=layout.grid // 2), stage, phase, parts)
    return (1 - phase.windowed) * whole + phase.windowed * small


def _flops(layout: Layout, stage: str, phase: Phase, parts: dict[str, Any]) -> float:
    c, temporal = parts["base"].config, parts.get(stage)
    tokens = c.text_len + layout.tokens
    flops = 0.0
    for part in ("base", stage):
        if part in parts:
            weights = sum(m.weight.numel() for m in parts[part].modules() if isinstance(m, nn.Linear))
            flops += weights * tokens * (6 if part in phase.trains else 4)
    predicted = len(layout.trained) * layout.frame_len
    flops += c.codes * c.width * predicted * (6 if "base" in phase.trains else 4)
    pairs = c.layers * (layout.sees("spatial").sum() + (layout.tokens + c.text_len) * c.text_len)
    if temporal is not None:
        for layer in range(c.layers):
            seen = layout.sees("temporal", temporal.window, bool(temporal.window) and layer % 2 == 1)
            pairs += seen.sum() + layout.tokens * c.text_len
    return flops + 12.0 * c.width * float(pairs)

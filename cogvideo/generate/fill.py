"""Fill in the frames of a layout, token by token, with a cache.

`fill` moves tokens only: text and known frames in, all frames out. It is a generator: long work yields, so
that progress, preview and cancel come free. Guidance is a doubled batch: the rows with the prompt and those
without are one forward and one cache.

Shapes: B samples, T text_len, F frames, N tokens a frame, V codes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvideo.generate.sampling import Sampling, guide, sample
from cogvideo.layout import Layout
from cogvideo.model.cache import Cache
from cogvideo.model.transformer import DualChannelTransformer


@dataclass(frozen=True)
class FillState:
    """How far a fill has come: `frames` [B, F, N] in time order, -1 where nothing is yet; tokens a sample
    that are done, and all of them."""

    frames: Tensor
    done: int
    total: int


@torch.inference_mode()
def fill(
    model: DualChannelTransformer,
    layout: Layout,
    text: Tensor,
    known: Tensor,
    sampling: Sampling,
    uniform: Tensor,
    plain: Tensor | None = None,
    last: Sampling | None = None,
    cache: Cache | None = None,
) -> Iterator[FillState]:
    """Generate the frames of `layout` that are not known; yield after every row of the grid.

    text [B, T]; known [B, k, N]: the first k frames in laid order; uniform [B, tokens to generate]: random
    numbers; plain [B, T]: the text without the prompt, needed if sampling.guidance_scale is over 1; last:
    options for the last token, if different; cache: one of this layout to be overwritten, with at least as
    many rows (two a sample with guidance), since fresh memory takes a fifth of the time.
    """
    guided = sampling.guided
    if guided and plain is None:
        raise ValueError("guidance needs the text without the prompt")
    size = layout.frame_len
    count = known.shape[1]
    rows = text if plain is None or not guided else torch.cat((text, plain))
    frames = torch.full((len(text), layout.frames, size), -1, dtype=torch.long, device=text.device)
    frames[:, :count] = known
    inputs = layout.inputs(known, model.config.start)
    cache = model.new_cache(layout, len(rows)) if cache is None else cache.rows(0, len(rows))
    prompt = torch.cat((rows, inputs.repeat(2, 1) if guided else inputs), 1)
    boost = 0.0 if guided else sampling.text_boost
    # on a CPU sums of a product depend on how many rows it has, and a sample must not on its neighbours
    group = 1 if text.device.type == "cpu" else len(rows)
    for i in range(0, len(rows), group):
        model.prefill(prompt[i : i + group], layout, cache.rows(i, group), boost)
    first = count * size
    total = (layout.frames - count) * size
    done = 0
    flat = frames.view(len(text), -1)
    for places in layout.waves(count, model.window):
        at, come = torch.tensor([places, layout.entering(places)], device=text.device)
        entering = flat[:, come].masked_fill(come < 0, model.config.start)  # [B, m]
        logits = model.step(entering.repeat(2, 1) if guided else entering, cache, places)
        if guided:
            logits = guide(logits, sampling.guidance_scale)
        if last is not None and places[-1] == layout.tokens - 1:
            sampling = last
        numbers = uniform[:, at - first].flatten()
        flat[:, at] = sample(logits.flatten(0, 1), sampling, numbers).view_as(entering)
        done += len(places)
        if done // layout.grid > (done - len(places)) // layout.grid:
            yield FillState(layout.unlay(frames), done, total)
    if total == 0:
        yield FillState(layout.unlay(frames), 0, 0)

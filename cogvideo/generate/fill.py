"""Fill in the frames of a layout, token by token, with a cache.

`fill` knows tokens only: text and known frames in, all frames out. It is a generator that yields the frames
so far, so progress, preview and cancel need no extra code. Guidance is a doubled batch: the rows with
the prompt and those without are one forward and one cache.

Shapes: B samples, T text_len, F frames, N tokens a frame, V codes, m tokens of one step.
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
    """The frames so far [B, F, N] in time order, -1 where no token is yet; tokens a sample that are
    generated, and all that will be; the sum of all logits, which is finite if these are."""

    frames: Tensor
    done: int
    total: int
    logit_sum: Tensor


@torch.inference_mode()
def fill(
    model: DualChannelTransformer,
    layout: Layout,
    text: Tensor,
    known: Tensor,
    sampling: Sampling,
    uniform: Tensor,
    *,
    unconditional: Tensor | None = None,
    last: Sampling | None = None,
    cache: Cache | None = None,
) -> Iterator[FillState]:
    """Generate the frames of `layout` that are not known; yield after every row of the grid.

    text [B, T]; known [B, k, N]: the first k frames in laid order; uniform [B, tokens to generate]: random
    numbers in [0, 1); unconditional [B, T]: the text without the prompt, needed for guidance; last: options
    for the last token, if different; cache: one of this layout to overwrite, with at least as many rows (two
    a sample with guidance), since allocating a new one takes a fifth of the time.
    """
    guided = sampling.guided
    if guided and unconditional is None:
        raise ValueError("guidance needs the text without the prompt")
    if guided and unconditional is not None:
        text = torch.cat((text, unconditional))

    count = known.shape[1]
    frames = known.new_full((len(known), layout.frames, layout.frame_tokens), -1)
    frames[:, :count] = known
    flat = frames.view(len(frames), -1)  # [B, F * N]

    cache = model.new_cache(layout, len(text)) if cache is None else cache.rows(0, len(text))
    inputs = layout.inputs(known, model.config.start)
    prefix = torch.cat((text, inputs.repeat(2, 1) if guided else inputs), 1)
    _prefill(model, layout, prefix, cache, boost=0.0 if guided else sampling.text_boost)

    first = count * layout.frame_tokens
    total = layout.clip_tokens - first
    done = 0
    logit_sum = torch.zeros((), device=text.device)
    for positions in layout.waves(count, model.window):
        targets, sources = torch.tensor([positions, layout.entering(positions)], device=text.device)
        tokens = flat[:, sources].masked_fill(sources < 0, model.config.start)  # [B, m]
        logits = model.step(tokens.repeat(2, 1) if guided else tokens, cache, positions)
        if guided:
            logits = guide(logits, sampling.guidance_scale)
        logit_sum = logit_sum + logits.sum()
        if last is not None and positions[-1] == layout.clip_tokens - 1:
            sampling = last
        numbers = uniform[:, targets - first].flatten()
        flat[:, targets] = sample(logits.flatten(0, 1), sampling, numbers).view_as(tokens)

        rows_before = done // layout.grid
        done += len(positions)
        if done // layout.grid > rows_before:
            yield FillState(layout.unlay(frames), done, total, logit_sum)
    if total == 0:
        yield FillState(layout.unlay(frames), 0, 0, logit_sum)


def _prefill(
    model: DualChannelTransformer, layout: Layout, prefix: Tensor, cache: Cache, boost: float
) -> None:
    """Write a prefix [B, T + S] into the cache; on a CPU row by row.

    There the sums of a matrix product depend on its number of rows, but a sample must not depend on the other
    samples of its batch.
    """
    rows = 1 if prefix.device.type == "cpu" else len(prefix)
    for i in range(0, len(prefix), rows):
        model.prefill(prefix[i : i + rows], layout, cache.rows(i, rows), boost)

"""What a loss reads of a batch: ids, codes, weights of positions; crops over the object, and wrong codes.

Shapes: B clips, F frames, N codes a frame, T ids.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from cogvideo.data.loader import Batch
from cogvideo.layout import SECONDS, Layout
from cogvideo.model.transformer import Base, DualChannelTransformer, TemporalChannel
from cogvideo.model.vqvae import VQVAE, Codebook
from cogvideo.text import TEMPLATE, TextTokenizer

if TYPE_CHECKING:
    from cogvideo.train.phase import Phase

Parts = Mapping[str, nn.Module]  # by name
M = TypeVar("M", bound=nn.Module)


def part(parts: Parts, name: str, kind: type[M]) -> M:
    """A part by its name, of the class that it has."""
    module = parts[name]
    assert isinstance(module, kind), f"{name} is a {type(module).__name__}, not a {kind.__name__}"
    return module


def prepare_text(tokenizer: TextTokenizer, batch: Batch, text_len: int, template: str = TEMPLATE) -> Tensor:
    """Ids [B, text_len] of the captions of a batch; longer ones are truncated (`loop.warn_of_long_captions`).
    A dropped caption is empty and keeps its duration."""
    rows = []
    for caption, duration in zip(batch.captions, batch.durations):
        ids = tokenizer.prompt(caption, duration, template)
        rows.append(tokenizer.pad_left(ids[:text_len], text_len))
    return torch.tensor(rows)


@torch.no_grad()
def encode_clips(vqvae: VQVAE, clips: Tensor) -> Tensor:
    """[B, F, 3, R, R] to codes [B, F, N]."""
    codes = vqvae.encode(clips.flatten(0, 1))
    return codes.view(len(clips), -1, codes.shape[1])


def object_weights(batch: Batch, phase: "Phase") -> Tensor | None:
    """How much each cell of the clips counts [B, F, cells, cells]: 1, and more where the object is."""
    if not phase.object_weight or batch.cover is None:
        return None
    return 1 + phase.object_weight * batch.cover.to(batch.device)


# -- crops over the object


def is_cropped(number: int, share: float) -> bool:
    """Whether the clip of this number is cropped: evenly, a `share` of consecutive clips."""
    return int((number + 1) * share) > int(number * share)


def crop_corners(batch: Batch, side: int, step: int = 1) -> Tensor:
    """First row and column [B, 2] of a crop of side x side codes for each clip, random by the clip's number.

    A crop holds what the object covers in any frame, or as much of it as fits. It lies anywhere if the video
    does not know where its object is (`cover` is zero). Both numbers are multiples of `step`, which keeps the
    tiles of the temporal channel whole. Raise ValueError if the phase's clips have no `cover`.
    """
    if batch.cover is None:
        raise ValueError("crops over the object need clips with a cover (ClipSpec.cover)")
    covers = batch.cover.amax(1).cpu()  # [B, cells, cells]
    return torch.stack([_corner(c, n, side, step) for c, n in zip(covers, batch.numbers)])


def _corner(cover: Tensor, seed: int, side: int, step: int) -> Tensor:
    """The corner [2] of a crop, for the share [cells, cells] of each cell that the object covers."""
    last = torch.full((2,), cover.shape[-1] - side)
    low = torch.zeros_like(last)
    high = last
    covered = (cover > 0.05).nonzero()
    if len(covered):
        ends = torch.stack((covered.amax(0) - side + 1, covered.amin(0)))  # the corner lies between these
        low = ends.amin(0).clamp(0).minimum(last)
        high = ends.amax(0).clamp(0).minimum(last)
    corner = low + (torch.rand(2, generator=seeded(seed)) * (high - low + 1)).long()
    return (corner + step // 2) // step * step


def crop_codes(maps: Tensor, corners: Tensor, side: int) -> Tensor:
    """Crop side x side codes from maps [B, F, N]: [B, F, side * side]."""
    grid = math.isqrt(maps.shape[-1])
    rows, columns = corners[:, :, None].add(torch.arange(side, device=maps.device)).unbind(1)  # [B, side]
    cells = (rows[:, :, None] * grid + columns[:, None]).flatten(1)  # [B, side * side]
    return maps.gather(2, cells[:, None].expand(-1, maps.shape[1], -1))


# -- wrong codes


def corrupt(codebook: Codebook, codes: Tensor, share: float, seeds: Sequence[int]) -> Tensor:
    """Codes [B, F, N] with about `share` of them replaced by similar ones, random by each clip's seed."""
    return codebook.perturb(codes.flatten(1), share, seeds).view_as(codes)


class Resampler:
    """Replaces codes of clips by what the trained stages would sample there, given the true codes before."""

    def __init__(self, parts: Parts):
        base = part(parts, "base", Base)
        self.stages: list[tuple[Layout, DualChannelTransformer]] = []
        for stage in ("stage1", "stage2"):
            model = DualChannelTransformer(base, part(parts, stage, TemporalChannel))
            self.stages.append((base.config.layout(stage), model))

    @torch.no_grad()
    def __call__(self, codes: Tensor, text: Tensor, batch: Batch, share: float) -> Tensor:
        """Codes [B, F, N] and ids [B, T] to codes of which about `share` are sampled anew. A clip that spans
        the whole duration is of key frames, any other of interpolated ones."""
        keyframes = torch.tensor([seconds >= SECONDS for seconds in batch.durations], device=codes.device)
        numbers = torch.stack([torch.rand(2, *codes.shape[1:], generator=seeded(n)) for n in batch.numbers])
        chances, uniform = numbers.to(codes.device).unbind(1)  # each [B, F, N]

        sampled = codes.clone()
        for (layout, model), rows in zip(self.stages, (keyframes, ~keyframes)):
            if rows.any():
                sampled[rows] = self._resample(layout, model, codes[rows], text[rows], uniform[rows])
        return torch.where(chances < share, sampled, codes)

    def _resample(
        self, layout: Layout, model: DualChannelTransformer, codes: Tensor, text: Tensor, uniform: Tensor
    ) -> Tensor:
        laid = layout.lay(codes)
        logits = model(torch.cat((text, layout.inputs(laid, model.config.start)), 1), layout)
        shares = logits.softmax(-1).cumsum(-1)  # [B, F * N, V]
        sampled = torch.searchsorted(shares, layout.lay(uniform).flatten(1)[..., None]).squeeze(-1)
        return layout.unlay(sampled.clamp_max(shares.shape[-1] - 1).view_as(laid))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

"""How a training phase is doing, as one image: the input above the output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogvideo.data.loader import Batch
from cogvideo.files import atomic_path
from cogvideo.generate.cogvideo import CogVideo
from cogvideo.layout import SECONDS
from cogvideo.model.folder import ModelFolder
from cogvideo.model.transformer import Base, DualChannelTransformer, TemporalChannel
from cogvideo.model.vqvae import VQVAE
from cogvideo.text import TextTokenizer
from cogvideo.train.inputs import Parts, part
from cogvideo.video import Frames

if TYPE_CHECKING:
    from cogvideo.train.phase import Phase

PREVIEW_CLIPS = 6  # of a batch


@torch.inference_mode()
def probe(folder: ModelFolder, parts: Parts, phase: Phase, batch: Batch, out: Path) -> None:
    """Write the preview of a phase, with its parts in their present state, to the image `out`."""
    image = phase.objective.preview(folder, parts, phase, batch)
    with atomic_path(out) as file:
        Image.fromarray(image).save(file)


def shown_clips(batch: Batch) -> Tensor:
    """The clips of a preview [B, F, 3, H, W], at their first size."""
    return batch.frames[0][:PREVIEW_CLIPS]


def preview_text(
    tokenizer: TextTokenizer, batch: Batch, text_len: int, seconds: float, template: str
) -> Tensor:
    """Ids [B, text_len] of the captions of a preview, all with the same duration."""
    rows = [tokenizer.prompt(caption, seconds, template) for caption in batch.captions[:PREVIEW_CLIPS]]
    return torch.tensor([tokenizer.pad_left(row[:text_len], text_len) for row in rows])


def samples(folder: ModelFolder, parts: Parts, prompts: Sequence[str]) -> Frames:
    """Clips that the token models generate now: a row for each, uint8 [H, W, 3]; or their first frames in one
    row, if there is no stage 1."""
    pipe = CogVideo(folder, next(parts["base"].parameters()).device, dtype="float32")
    base = part(parts, "base", Base)
    pipe.parts.base = base
    pipe.parts.vqvae = part(parts, "vqvae", VQVAE)
    for stage in ("stage1", "stage2"):
        if stage in parts:
            model = DualChannelTransformer(base, part(parts, stage, TemporalChannel))
            setattr(pipe.parts, stage, model)

    prompts = [
        prompt for prompt in prompts if len(pipe.text.prompt(prompt, SECONDS)) <= pipe.spec.model.text_len
    ]
    seeds = list(range(len(prompts)))
    if "stage1" not in parts and not folder.has("stage1"):
        frames = [clip.frames for clip in pipe.decode(pipe.first_frames(prompts, seeds))]
        return np.concatenate([np.concatenate(list(f), 1) for f in frames], 1)

    draft = pipe.keyframes(prompts, seeds)
    if "stage2" in parts:
        draft = pipe.interpolate(draft)
    return np.concatenate([np.concatenate(list(clip.frames), 1) for clip in pipe.decode(draft)])


def rows_of(*versions: Tensor) -> Frames:
    """Versions [B, F, 3, H, W] of the same clips as one image, uint8 [rows, columns, 3]: a row for each
    clip and version."""
    stacked = torch.stack([version.clamp(0, 1).float().cpu() for version in versions], 1)
    rows = stacked.flatten(0, 1)  # [B * versions, F, 3, H, W]
    image = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # [rows, columns, 3]
    pixels: Frames = (image * 255).round().byte().numpy()
    return pixels

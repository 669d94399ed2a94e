"""Images of how a phase is doing: what goes in above what comes out, and samples of token models."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cogvideo.generate.cogvideo import CogVideo
from cogvideo.layout import SECONDS
from cogvideo.model.folder import ModelFolder
from cogvideo.model.transformer import Base, DualChannelTransformer, TemporalChannel
from cogvideo.model.vqvae import VQVAE
from cogvideo.train.inputs import Parts, part
from cogvideo.video import Frames

CLIPS = 6  # in an image


def rows(*versions: Tensor) -> Frames:
    """Versions [B, F, 3, H, W] of the same clips as one image: a row for each clip and version."""
    clips = torch.stack([one.clamp(0, 1).float().cpu() for one in versions], 1)
    clips = clips.flatten(0, 1)  # [B * versions, F, 3, H, W]
    image = clips.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    pixels: Frames = (image * 255).round().byte().numpy()
    return pixels


def samples(folder: ModelFolder, parts: Parts, captions: Sequence[str]) -> Frames:
    """Clips that a token model generates now, for captions of its training, as one image: a row a clip.

    Dropped captions are left out, and those that are too long for the model.
    """
    pipe = CogVideo(folder, next(parts["base"].parameters()).device, dtype="float32")
    base = part(parts, "base", Base)
    pipe.parts.base = base
    pipe.parts.vqvae = part(parts, "vqvae", VQVAE)
    for stage in ("stage1", "stage2"):
        if stage in parts:
            model = DualChannelTransformer(base, part(parts, stage, TemporalChannel))
            setattr(pipe.parts, stage, model)

    longest = pipe.spec.model.text_len
    prompts = [one for one in captions if one and len(pipe.text.prompt(one, SECONDS)) <= longest]
    prompts = prompts[:CLIPS] or [""]
    seeds = list(range(len(prompts)))
    if "stage1" not in parts and not folder.has("stage1"):
        draft = pipe.first_frames(prompts, seeds)
    else:
        draft = pipe.keyframes(prompts, seeds)
    if "stage2" in parts:
        draft = pipe.interpolate(draft)
    clips = [np.concatenate(list(clip.frames), 1) for clip in pipe.decode(draft)]
    return np.concatenate(clips)

"""How a training phase is doing, as one picture: what goes in above what comes out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogvideo.data.loader import Batch
from cogvideo.files import replacing
from cogvideo.generate.cogvideo import CogVideo
from cogvideo.layout import SECONDS
from cogvideo.model.folder import ModelFolder
from cogvideo.model.refiner import resize
from cogvideo.model.transformer import DualChannelTransformer
from cogvideo.text import PLAIN
from cogvideo.train.objectives import decoder, tokenizer
from cogvideo.train.phase import Phase

SHOWN = 6  # clips


@torch.inference_mode()
def probe(folder: ModelFolder, parts: dict[str, Any], phase: Phase, batch: Batch, out: Path) -> None:
    """Write the strip of a phase. tokenizer, refiner: the batch and what becomes of it, row by row. Token
    models: samples for the captions of the batch, made with the weights as they are now."""
    clips = batch.frames[0][:SHOWN] if batch.frames else torch.empty(0)  # clips that recur are codes
    if "regression" in parts:
        text, c = folder.text(), parts["regression"].config
        ids = [
            text.pad_left(text.prompt(one, 0.0, PLAIN)[: c.text_len], c.text_len)
            for one in batch.captions[:SHOWN]
        ]
        (rate,), keep = phase.cut.rates, phase.cut.keep
        made = parts["regression"](torch.tensor(ids, device=clips.device), rate, c.slots(rate)[:keep])
        rows = _rows(made, clips)
    elif phase.objective is tokenizer:
        vqvae = parts["vqvae"]
        flat = clips.flatten(0, 1)
        rows = _rows(
            clips,
            (vqvae(flat)[0] if not vqvae.codebook.filled else vqvae.decode(vqvae.encode(flat))).unflatten(
                0, clips.shape[:2]
            ),
        )
    elif phase.objective is decoder:
        vqvae, size = parts["vqvae"], parts["decoder"].config.text_len
        text = folder.text()
        ids = [text.pad_left(text.prompt(one, SECONDS)[:size], size) for one in batch.captions[:SHOWN]]
        codes = vqvae.encode(clips.flatten(0, 1))
        apart = vqvae.decode(codes).unflatten(0, clips.shape[:2])
        z = vqvae.vectors(codes).unflatten(0, clips.shape[:2])
        rows = _rows(clips, apart, parts["decoder"](z, torch.tensor(ids, device=clips.device)))
    elif phase.name == "refiner":
        low = clips
        if "vqvae" in parts:
            codes = parts["vqvae"].encode(clips.flatten(0, 1))
            low = parts["vqvae"].decode(codes).unflatten(0, clips.shape[:2])
        rows = _rows(
            resize(low, parts["refiner"].config.scale), parts["refiner"](low), batch.frames[1][:SHOWN]
        )
    else:
        rows = _samples(folder, parts, batch.captions[:SHOWN])
    with replacing(out) as file:
        Image.fromarray(rows).save(file)


def _samples(folder: ModelFolder, parts: dict[str, Any], prompts: list[str]) -> np.ndarray:
    pipe = CogVideo(folder, next(parts["base"].parameters()).device, dtype="float32")
    pipe.parts.base, pipe.parts.vqvae = parts["base"], parts["vqvae"]  # as they are at this step
    for stage in ("stage1", "stage2"):
        if stage in parts:
            setattr(pipe.parts, stage, DualChannelTransformer(parts["base"], parts[stage]))
    prompts = [one for one in prompts if len(pipe.text.prompt(one, SECONDS)) <= pipe.spec.model.text_len]
    seeds = list(range(len(prompts)))
    if "stage1" not in parts and not folder.has("stage1"):
        frames = [clip.frames for clip in pipe.decode(pipe.first_frames(prompts, seeds))]
        return np.concatenate([np.concatenate(list(f), 1) for f in frames], 1)
    draft = pipe.keyframes(prompts, seeds)
    if "stage2" in parts:
        draft = pipe.interpolate(draft)
    return np.concatenate([np.concatenate(list(clip.frames), 1) for clip in pipe.decode(draft)])


def _rows(*versions: Tensor) -> np.ndarray:
    """Versions [B, F, 3, H, W] of the same clips: a row for each clip and version."""
    rows = torch.stack([v.clamp(0, 1).float().cpu() for v in versions], 1).flatten(
        0, 1
    )  # [B * versions, F, 3, H, W]
    return (rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2) * 255).round().byte().numpy()

"""Pictures of clips: the frames so far of one that is being generated, its thumbnail and its sheet.

Shapes: F frames, N tokens a frame, S pixels a side.
"""

import io
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogvideo.hardware import has_fast_bfloat16
from cogvideo.model.vqvae import VQVAE, to_frames
from cogvideo.video import Clip, Frames

SIDE = 96  # pixels of a frame in a strip
QUALITY = 80


@dataclass
class Strip:
    """The frames so far of one clip, side by side; a cell is transparent until its token is there.

    A finished frame is decoded once: it keeps its place in time while later rounds put others between.
    """

    vqvae: VQVAE
    tiles: dict[float, Image.Image] = field(default_factory=dict)  # by the share of the clip before them

    @torch.inference_mode()
    def draw(self, codes: Tensor) -> bytes:
        """codes [F, N], -1 where no token is yet, to a picture of F * SIDE x SIDE pixels, as webp."""
        places = [i / max(1, len(codes) - 1) for i in range(len(codes))]
        known = codes >= 0
        begun = known.any(1)
        new = [i for i, place in enumerate(places) if begun[i] and place not in self.tiles]
        strip = Image.new("RGBA", (SIDE * len(codes), SIDE))
        if new:
            frames = to_frames(self._decode(codes[new]))
            for i, frame in zip(new, frames):
                tile = _tile(frame, known[i])
                if known[i].all():
                    self.tiles[places[i]] = tile
                strip.paste(tile, (SIDE * i, 0))
        for i, place in enumerate(places):
            if place in self.tiles:
                strip.paste(self.tiles[place], (SIDE * i, 0))
        return _webp(strip)

    def _decode(self, codes: Tensor) -> Tensor:
        """Codes [B, N] to images; where there is none, the mean of the frame's others stands in for it."""
        z = self.vqvae.vectors(codes.clamp_min(0)).float()
        side = math.isqrt(codes.shape[1])
        known = (codes >= 0).view(-1, 1, side, side).float()
        mean = (z * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
        z = torch.where(known > 0, z, mean).to(self.vqvae.dtype)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=has_fast_bfloat16(z.device)):
            return self.vqvae.rebuild(z).clamp(0, 1)


def _tile(frame: Frames, known: Tensor) -> Image.Image:
    """A frame uint8 [S, S, 3] as a small picture, transparent where known [N] is false."""
    grid = math.isqrt(len(known))
    mask = known.view(grid, grid).numpy().astype(np.uint8) * 255
    tile = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BOX).convert("RGBA")
    tile.putalpha(Image.fromarray(mask).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    return tile


def thumbnail(clip: Clip) -> bytes:
    """The first frame, as webp."""
    return _webp(Image.fromarray(clip.frames[0]))


def spritesheet(clip: Clip) -> bytes:
    """All frames in rows, 2 * SIDE pixels each, as webp: as many a row as rows, or one more."""
    count = len(clip.frames)
    columns = math.ceil(math.sqrt(count))
    side = 2 * SIDE
    sheet = Image.new("RGB", (columns * side, math.ceil(count / columns) * side))
    for i, frame in enumerate(clip.frames):
        tile = Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(tile, (i % columns * side, i // columns * side))
    return _webp(sheet)


def _webp(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "webp", quality=QUALITY, method=2)
    return stream.getvalue()

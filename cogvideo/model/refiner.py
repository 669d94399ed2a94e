"""The refiner: small decoded frames to larger, better ones, each seen with its neighbours in time.

A residual convolutional network at the low resolution, sub-pixel upsampling (Shi 2016) on top of a bicubic
enlargement. It is trained on what the tokenizer makes of a clip, so it mends the tokenizer's blur as well.

Shapes: clips [B, F, 3, h, w] to [B, F, 3, scale * h, scale * w], pixels in [0, 1].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RefinerConfig:
    scale: int = 4
    width: int = 64
    blocks: int = 6
    reach: int = 1  # neighbours on each side


class Refiner(nn.Module):
    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.enter = nn.Conv2d(3 * (2 * config.reach + 1), width, 3, padding=1)
        self.first = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(config.blocks))
        self.second = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(config.blocks))
        self.leave = nn.Conv2d(width, 3 * config.scale**2, 3, padding=1)
        for p in self.leave.parameters():  # begins as a bicubic enlargement
            nn.init.zeros_(p)

    def forward(self, clip: Tensor) -> Tensor:
        return enlarge(clip, self.config.scale) + self.detail(clip)

    def detail(self, clip: Tensor) -> Tensor:
        """What is added to the enlarged clip."""
        reach, frames = self.config.reach, clip.shape[1]
        around = [
            (torch.arange(frames, device=clip.device) + d).clamp(0, frames - 1)
            for d in range(-reach, reach + 1)
        ]
        x = torch.cat([clip[:, index] for index in around], 2).flatten(0, 1)  # [B*F, 3 * (2 reach + 1), h, w]
        x = x.contiguous(memory_format=torch.channels_last)  # which convolutions are faster with
        x = h = self.enter(2 * x - 1)
        for first, second in zip(self.first, self.second):
            h = h + second(F.silu(first(h)))
        detail = F.pixel_shuffle(self.leave(F.silu(h + x)), self.config.scale)  # [B*F, 3, scale h, scale w]
        return detail.unflatten(0, (-1, frames))


def enlarge(clip: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement of [B, F, 3, h, w]: what the refiner starts from and is measured against."""
    big = F.interpolate(clip.flatten(0, 1), scale_factor=scale, mode="bicubic", align_corners=False)
    return big.unflatten(0, (len(clip), -1))

"""The refiner: small decoded frames to larger, sharper ones, using neighbouring frames.

A residual convolutional network at the low resolution; its sub-pixel upsampling (Shi 2016) is added to the
bicubically resized clip. It is trained on clips that the tokenizer decoded, so it corrects their blur, too.

Shapes: clips [B, F, 3, h, w] to [B, F, 3, scale * h, scale * w], pixels in [0, 1].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.model.config import Size, SmallCount, SmallSize


@dataclass(frozen=True)
class RefinerConfig:
    scale: SmallSize = 4
    width: Size = 64
    blocks: SmallCount = 6
    reach: SmallCount = 1  # neighbours on each side


class Refiner(nn.Module):
    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.enter = nn.Conv2d(3 * (2 * config.reach + 1), width, 3, padding=1)
        self.first = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(config.blocks))
        self.second = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(config.blocks))
        self.leave = nn.Conv2d(width, 3 * config.scale**2, 3, padding=1)
        for parameter in self.leave.parameters():  # initially, the output is the bicubically resized clip
            nn.init.zeros_(parameter)

    def forward(self, clip: Tensor) -> Tensor:
        return resize(clip, self.config.scale) + self.detail(clip)

    def detail(self, clip: Tensor) -> Tensor:
        """The residual that is added to the resized clip."""
        reach = self.config.reach
        frames = clip.shape[1]
        number = torch.arange(frames, device=clip.device)
        neighbours = []
        for offset in range(-reach, reach + 1):
            neighbours.append(clip[:, (number + offset).clamp(0, frames - 1)])
        x = torch.cat(neighbours, 2).flatten(0, 1)  # [B*F, 3 * (2 reach + 1), h, w]
        x = x.contiguous(memory_format=torch.channels_last)  # for faster convolutions
        x = h = self.enter(2 * x - 1)
        for first, second in zip(self.first, self.second):
            h = h + second(F.silu(first(h)))
        detail = F.pixel_shuffle(self.leave(F.silu(h + x)), self.config.scale)  # [B*F, 3, scale h, scale w]
        clips: Tensor = detail.unflatten(0, (-1, frames))
        return clips


def resize(clip: Tensor, scale: int) -> Tensor:
    """Bicubic resizing of [B, F, 3, h, w]: the refiner's starting point and baseline."""
    large = F.interpolate(clip.flatten(0, 1), scale_factor=scale, mode="bicubic", align_corners=False)
    clips: Tensor = large.unflatten(0, (len(clip), -1))
    return clips

"""A discriminator of short clips, which teaches the video decoder the sharpness that no distance asks for.

A distance to the true image is smallest for the mean of all plausible images, which is blurred. The
discriminator learns to tell decoded clips from true ones, the decoder learns to make that hard (Goodfellow
2014). It scores patches of a few frames, so it sees flicker as well as blur. Notable:
- A small weight and a penalty on its slope at true clips keep it stable from the first step, as in MAGVIT
  (Yu 2023). MAGVIT's LeCam is left out: it helps with data that can be memorised.
- The slope is measured as the change that a little noise makes (Lin 2025): no gradient of a gradient.
- It belongs to a training run, not to a model: the run's checkpoint keeps it, the model folder does not.

Shapes: B clips, F frames, H and W pixels, h and w scores of patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.model.features import weighted

NOISE = 0.01  # standard deviation of the noise that measures the slope; pixels are from 0 to 1
SLOPE = 100.0  # weight of the squared change of scores by that noise, as R1 weighs the squared gradient


class Discriminator(nn.Module):
    """`forward(clips)`: clips [B, F, 3, H, W] in [0, 1] to scores [B, F, h, w], higher for true ones; a score
    for each 8 x 8 pixels of each frame."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(12, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv3d(width, 2 * width, 3, (1, 2, 2), padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv3d(2 * width, 4 * width, 3, (1, 2, 2), padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv3d(4 * width, 1, (1, 3, 3), padding=(0, 1, 1)),
        )

    def forward(self, clips: Tensor) -> Tensor:
        x = F.pixel_unshuffle(2 * clips.flatten(0, 1) - 1, 2)  # [B * F, 12, H / 2, W / 2]
        x = x.view(*clips.shape[:2], *x.shape[1:]).transpose(1, 2)  # [B, 12, F, H / 2, W / 2]
        scores: Tensor = self.layers(x)
        return scores.squeeze(1).float()


def new_discriminator(seed: int) -> Discriminator:
    """Build a discriminator with new weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Discriminator()


@dataclass(frozen=True)
class AdversarialLosses:
    """The losses of one step; the gradient of each leaves the other network alone."""

    decoder: Tensor
    discriminator: Tensor
    numbers: dict[str, float]  # mean scores


def adversarial_losses(
    discriminator: Discriminator,
    decoded: Tensor,
    true_clips: Tensor,
    seeds: Sequence[int],
    weights: Tensor | None = None,
) -> AdversarialLosses:
    """Decoded clips against true ones, both [B, F, 3, H, W]. seeds: a number a clip, for the noise. weights
    [B, F, y, x], of any size: how much a cell counts, relative to the other cells of its clip."""
    if weights is not None:
        weights = (weights / weights.mean((1, 2, 3), keepdim=True)).flatten(0, 1)

    def mean(values: Tensor) -> Tensor:
        return weighted(values.flatten(0, 1), weights).mean()

    discriminator.requires_grad_(False)
    decoder = mean(F.softplus(-discriminator(decoded)))
    discriminator.requires_grad_(True)

    noise = torch.stack([_noise(clip, seed) for clip, seed in zip(true_clips, seeds)])
    judged = torch.cat((true_clips, true_clips + NOISE * noise, decoded.detach()))
    true, shaken, false = discriminator(judged).chunk(3)
    slope = SLOPE * (true - shaken).square().mean()
    loss = mean(F.softplus(-true)) + mean(F.softplus(false)) + slope
    scores = {"adversary": decoder, "true": true.mean(), "decoded": false.mean()}
    return AdversarialLosses(decoder, loss, {name: float(value.detach()) for name, value in scores.items()})


def _noise(clip: Tensor, seed: int) -> Tensor:
    """Noise for a clip, from its own seed: the same alone or in a batch."""
    generator = torch.Generator(clip.device).manual_seed(seed)
    return torch.randn(clip.shape, generator=generator, device=clip.device)

"""The frame tokenizer: pixels to a grid of codes and back.

A convolutional VQ-VAE (van den Oord 2017, Esser 2021). Notable:
- The codebook is not trained by gradients but follows the encoder as an exponential moving average; codes
that
  nobody chooses are revived from encoder outputs of the batch. It is filled from encoder outputs as well,
  after some steps without quantisation: a codebook started from random numbers collapses.
- Frames are independent: a clip is encoded and decoded as a batch of pictures.
- `HierarchicalVQVAE` is the image tokenizer of the released CogVideo: one encoder and one codebook for
  several rates, a decoder for each.

Shapes: B pictures, R resolution in pixels, N = grid * grid codes, C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.hardware import constant

NEAR = 16  # codes that may stand for one when codes are perturbed


@dataclass(frozen=True)
class VQVAEConfig:
    resolution: int = 48  # pixels, square
    channels: int = 32  # of the first level; level i has channels * multipliers[i]
    multipliers: tuple[int, ...] = (1, 2, 4)  # one level each, resolution halves between levels
    encoder_blocks: int = 1  # residual blocks a level
    decoder_blocks: int = 1
    mid_attention: bool = True
    codes: int = 1024
    code_width: int = 32
    groups: int = 16  # of every GroupNorm
    patch: int = 1  # pixels a side that the first layer folds into channels, and the last one unfolds
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # pixels in [0, 1] are normalised by these
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    # of a HierarchicalVQVAE
    rates: tuple[int, ...] = ()  # pixels a side that one code stands for, each twice the one before
    rate: int = 0  # the one of `rates` that is meant when none is named
    attended: tuple[int, ...] = ()  # levels in which attention follows every residual block

    @property
    def grid(self) -> int:
        """Codes a side of the picture."""
        return self.resolution // (self.rate or self.patch * 2 ** (len(self.multipliers) - 1))


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head attention over the positions of the map."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, c, h * w).transpose(2, 3).unbind(1)  # [B, hw, C]
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, c, h, w)
        return x + self.out(y)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # pads right and below only


class ResidualDownsample(Downsample):
    """The strided convolution beside an average."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) + super().forward(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int, config: VQVAEConfig) -> list[nn.Module]:
    attention = [AttentionBlock(channels, config.groups)] if config.mid_attention else []
    return [
        ResidualBlock(channels, channels, config.groups),
        *attention,
        ResidualBlock(channels, channels, config.groups),
    ]


def _level(width: int, outputs: int, blocks: int, attended: bool, groups: int) -> list[nn.Module]:
    """The residual blocks of one level, from `width` channels to `outputs`."""
    parts: list[nn.Module] = []
    for number in range(blocks):
        parts.append(ResidualBlock(outputs if number else width, outputs, groups))
        if attended:
            parts.append(AttentionBlock(outputs, groups))
    return parts


def _encoder(config: VQVAEConfig) -> nn.Sequential:
    width = config.channels * config.multipliers[0]
    parts: list[nn.Module] = [nn.Conv2d(3 * config.patch**2, width, 3, padding=1)]
    if config.patch > 1:
        parts.insert(0, nn.PixelUnshuffle(config.patch))
    for level, multiplier in enumerate(config.multipliers):
        if level > 0:
            parts.append(Downsample(width))
        outputs = config.channels * multiplier
        parts += _level(width, outputs, config.encoder_blocks, level in config.attended, config.groups)
        width = outputs
    parts += _middle(width, config)
    parts += [
        nn.GroupNorm(config.groups, width, eps=1e-6),
        nn.SiLU(),
        nn.Conv2d(width, config.code_width, 3, padding=1),
    ]
    return nn.Sequential(*parts)


def _decoder(config: VQVAEConfig, multipliers: tuple[int, ...]) -> nn.Sequential:
    width = config.channels * multipliers[-1]
    parts: list[nn.Module] = [nn.Conv2d(config.code_width, width, 3, padding=1), *_middle(width, config)]
    for level, multiplier in reversed(list(enumerate(multipliers))):
        outputs = config.channels * multiplier
        parts += _level(width, outputs, config.decoder_blocks, level in config.attended, config.groups)
        width = outputs
        if level > 0:
            parts.append(Upsample(width))
    parts += [
        nn.GroupNorm(config.groups, width, eps=1e-6),
        nn.SiLU(),
        nn.Conv2d(width, 3 * config.patch**2, 3, padding=1),
    ]
    if config.patch > 1:
        parts.append(nn.PixelShuffle(config.patch))
    return nn.Sequential(*parts)


def decoder_of(config: VQVAEConfig) -> nn.Sequential:
    """Fresh layers from vectors of codes to pictures: those of the tokenizer, for others to start with."""
    return _decoder(config, config.multipliers)


class Codebook(nn.Module):
    """Nearest-neighbour quantiser whose codes are moving averages of the vectors that chose them.

    `decay` is the memory of the average; a code whose average use in a batch falls under `dead` is moved to a
    random vector of the batch. Until `fill` was called, vectors pass through unquantised (`filled` is False).
    """

    def __init__(self, codes: int, width: int, decay: float = 0.99, dead: float = 0.02):
        super().__init__()
        self.decay, self.dead = decay, dead
        self.vectors: Tensor
        self.uses: Tensor
        self.sums: Tensor
        self.filled: Tensor
        self.register_buffer("vectors", torch.zeros(codes, width))
        self.register_buffer("uses", torch.ones(codes))  # average number of choices in a batch
        self.register_buffer("sums", torch.zeros(codes, width))
        self.register_buffer("filled", torch.tensor(False))

    def nearest(self, z: Tensor) -> Tensor:
        """z [M, C] to the ids [M] of the nearest codes."""
        return self._distances(z).argmin(1)

    def perturbed(self, ids: Tensor, share: float, seeds: Sequence[int]) -> Tensor:
        """Replace about `share` of the ids [B, M], each by one of the `NEAR` nearest codes (RobusTok, 2025).

        What a model samples is often a near miss; a decoder trained so forgives it. Row i is drawn from seed
        i, whatever batch it is in.
        """
        changed = ids.clone()
        for row, seed in zip(changed, seeds):
            generator = torch.Generator().manual_seed(seed)
            chosen = (torch.rand(len(row), generator=generator) < share).to(ids.device)
            near = self._distances(self.vectors[row[chosen]]).topk(NEAR + 1, largest=False).indices[:, 1:]
            rank = torch.randint(NEAR, (len(near), 1), generator=generator).to(ids.device)
            row[chosen] = near.gather(1, rank).squeeze(1)
        return changed

    def _distances(self, z: Tensor) -> Tensor:
        """Squared distances of z [M, C] to all codes [M, V], less |z|^2; always in float32."""
        with torch.autocast(z.device.type, enabled=False):
            return self.vectors.square().sum(1) - 2 * z.float() @ self.vectors.T

    @torch.no_grad()
    def fill(self, z: Tensor, generator: torch.Generator | None = None) -> None:
        """Place every code on a vector of z [M, C], each taken at most once while they last."""
        picked = z[_pick(len(z), len(self.vectors), generator)]
        self.vectors.copy_(picked)
        self.sums.copy_(picked)
        self.uses.fill_(1.0)
        self.filled.fill_(True)

    @torch.no_grad()
    def follow(self, z: Tensor, ids: Tensor, generator: torch.Generator | None = None) -> None:
        """Move the codes towards the vectors z [M, C] that chose them; revive the dead ones."""
        chosen = torch.bincount(ids, minlength=len(self.vectors)).to(z.dtype)
        self.uses.lerp_(chosen, 1 - self.decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, ids, z), 1 - self.decay)
        self.vectors.copy_(self.sums / self.uses.clamp_min(1e-5).unsqueeze(1))
        dead = (self.uses < self.dead).nonzero().squeeze(1)
        if len(dead):
            revived = z[_pick(len(z), len(dead), generator)]
            self.vectors[dead], self.sums[dead], self.uses[dead] = revived, revived, 1.0


def _pick(population: int, count: int, generator: torch.Generator | None) -> Tensor:
    order = torch.randperm(population, generator=generator)
    return order.repeat(-(-count // population))[:count]


class VQVAE(nn.Module):
    """`encode` pictures to codes, `decode` codes to pictures; pictures are float [B, 3, R, R] in [0, 1]."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.codebook = Codebook(config.codes, config.code_width)
        self.decoder = decoder_of(config)

    def _normalise(self, pictures: Tensor) -> Tensor:
        mean, std = (constant(v, pictures).view(3, 1, 1) for v in (self.config.mean, self.config.std))
        return (pictures - mean) / std

    def _denormalise(self, x: Tensor) -> Tensor:
        mean, std = (constant(v, x).view(3, 1, 1) for v in (self.config.mean, self.config.std))
        return x * std + mean

    def latents(self, pictures: Tensor) -> Tensor:
        """[B, 3, R, R] to encoder outputs before quantisation [B, C, grid, grid]."""
        return self.encoder(self._normalise(pictures))

    def rebuild(self, z: Tensor) -> Tensor:
        """Vectors [B, C, grid, grid] to pictures [B, 3, R, R], not clamped."""
        return self._denormalise(self.decoder(z).float())

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """[B, 3, R, R] in [0, 1] to ids [B, N], raster order."""
        z = self.latents(pictures).float().permute(0, 2, 3, 1)  # [B, grid, grid, C]
        return self.codebook.nearest(z.flatten(0, 2)).view(len(z), -1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """ids [B, N] to pictures [B, 3, R, R], clamped to [0, 1]."""
        return self.rebuild(self.vectors(ids).to(self.dtype)).clamp(0, 1)

    def vectors(self, ids: Tensor) -> Tensor:
        """ids [B, N] to the vectors of their codes [B, C, grid, grid]."""
        side = math.isqrt(ids.shape[1])
        return self.codebook.vectors[ids].unflatten(1, (side, side)).permute(0, 3, 1, 2)

    def forward(
        self,
        pictures: Tensor,
        generator: torch.Generator | None = None,
        perturb: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct for training: (pictures' reconstruction, commitment loss, ids [B*N]).

        In training mode a share `perturb` of the codes that the decoder sees is replaced by near ones, drawn
        from each picture's seed.

        Gradients pass the quantiser straight through. In training mode the codebook follows the encoder.
        Before the codebook is filled the reconstruction is that of the unquantised latents, and the
        commitment loss is 0.
        """
        z = self.latents(pictures).float()  # [B, C, g, g]
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)  # [B*N, C]
        if not self.codebook.filled:
            ids, loss, quantised = flat.new_zeros(len(flat), dtype=torch.long), z.new_zeros(()), z
        else:
            ids = self.codebook.nearest(flat.detach())
            target = self.vectors(ids.view(len(z), -1))
            loss = F.mse_loss(z, target)
            if perturb and self.training:
                target = self.vectors(self.codebook.perturbed(ids.view(len(z), -1), perturb, seeds))
            quantised = z + (target - z).detach()
            if self.training:
                self.codebook.follow(flat.detach(), ids, generator)
        return self.rebuild(quantised), loss, ids

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class HierarchicalVQVAE(VQVAE):
    """The image tokenizer of icetk (docs/reference.md, "icetk"): the same codes at several rates, 4, 8 and 16 in the original.

    The encoder brings a picture to the first rate; each further rate halves the map once more. A code of rate
    r stands for r x r pixels; pictures may have any size that it divides. `rate` 0 is the configured one.
    """

    def __init__(self, config: VQVAEConfig):
        nn.Module.__init__(self)
        self.config = config
        self.encoder = _encoder(config)
        self.halves = nn.ModuleList(ResidualDownsample(config.code_width) for _ in config.rates[1:])
        self.project = nn.Conv2d(config.code_width, config.code_width, 1)
        self.codebook = Codebook(config.codes, config.code_width)
        # the finest levels have as many channels as the first, so that a decoder reaches all pixels
        self.decoders = nn.ModuleList(
            _decoder(config, (1,) * number + config.multipliers) for number in range(len(config.rates))
        )

    def _number(self, rate: int) -> int:
        rate = rate or self.config.rate
        if rate not in self.config.rates:
            raise ValueError(f"no rate {rate}; choose one of {', '.join(map(str, self.config.rates))}")
        return self.config.rates.index(rate)

    def latents(self, pictures: Tensor, rate: int = 0) -> Tensor:
        """[B, 3, H, W] to vectors before quantisation [B, C, H / rate, W / rate]."""
        z = self.encoder(self._normalise(pictures))
        for halve in self.halves[: self._number(rate)]:
            z = halve(z)
        return self.project(z)

    @torch.no_grad()
    def encode(self, pictures: Tensor, rate: int = 0) -> Tensor:
        """[B, 3, H, W] in [0, 1] to ids [B, N], raster order."""
        z = self.latents(pictures.to(self.dtype), rate).float().permute(0, 2, 3, 1)  # [B, h, w, C]
        return self.codebook.nearest(z.flatten(0, 2)).view(len(z), -1)

    def rebuild(self, z: Tensor, rate: int = 0) -> Tensor:
        """Vectors [B, C, h, w] to pictures [B, 3, h * rate, w * rate], not clamped."""
        return self._denormalise(self.decoders[self._number(rate)](z).float())

    @torch.no_grad()
    def decode(self, ids: Tensor, rate: int = 0) -> Tensor:
        """ids [B, N] of square maps, of any size, to pictures [B, 3, R, R], clamped to [0, 1]."""
        side = math.isqrt(ids.shape[1])
        assert side * side == ids.shape[1], f"{ids.shape[1]} codes are no square map"
        z = self.codebook.vectors[ids].unflatten(1, (side, side)).permute(0, 3, 1, 2).to(self.dtype)
        # one by one: the widest maps of a large picture take much memory
        return torch.cat([self.rebuild(one, rate) for one in z.split(1)]).clamp(0, 1)


def to_pictures(frames: np.ndarray) -> Tensor:
    """Frames uint8 [..., H, W, 3] to pictures float [..., 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 255


def to_frames(pictures: Tensor) -> np.ndarray:
    """Pictures float [..., 3, H, W], cut off at 0 and 1, to frames uint8 [..., H, W, 3]."""
    return (pictures.float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()

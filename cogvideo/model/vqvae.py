"""The frame tokenizer: images to grids of codes and back.

A convolutional VQ-VAE (van den Oord 2017, Esser 2021). Notable:
- Gradients do not train the codebook: it is an exponential moving average (EMA) of encoder outputs. Codes
  that no vector chooses are moved to encoder outputs of the batch.
- The first steps do not quantise; then the codebook is initialised with encoder outputs. A codebook that
  starts from random numbers collapses.
- Frames are independent: a clip is encoded and decoded as a batch of images.
- `HierarchicalVQVAE` is the image tokenizer of the released CogVideo: one encoder and one codebook for
  several downsampling factors, and a decoder for each.

Shapes: B images, R resolution in pixels, N = grid * grid codes, C channels.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.hardware import constant
from cogvideo.model.config import Ids, Range, Size, SmallCount, SmallSize
from cogvideo.video import Frames

NEIGHBOURS = 16  # nearest codes, one of which replaces a perturbed code


Positive = Annotated[float, Range(1e-6, 1e6)]


@dataclass(frozen=True)
class VQVAEConfig:
    resolution: Size = 48  # pixels, square
    channels: Size = 32  # of the first level; level i has channels * multipliers[i]
    multipliers: tuple[SmallSize, ...] = (1, 2, 4)  # one level each, resolution halves between levels
    encoder_blocks: SmallSize = 1  # residual blocks a level
    decoder_blocks: SmallSize = 1
    mid_attention: bool = True
    codes: Ids = 1024
    code_width: Size = 32
    groups: Size = 16  # of every GroupNorm
    patch: SmallSize = 1  # pixels a side that the first layer folds into channels, and the last one unfolds
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # pixels in [0, 1] are normalised by these
    std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)
    # of a HierarchicalVQVAE
    rates: tuple[
        SmallSize, ...
    ] = ()  # downsampling factors, each twice the one before; none: one, by the encoder
    rate: SmallCount = 0  # the one of `rates` that is used by default
    attended: tuple[SmallCount, ...] = ()  # levels in which attention follows every residual block

    def __post_init__(self) -> None:
        if not 1 <= len(self.multipliers) <= 12:
            raise ValueError(f"multipliers must be 1 to 12 numbers; got {len(self.multipliers)}")
        for multiplier in self.multipliers:
            channels = self.channels * multiplier
            if channels % self.groups:
                raise ValueError(
                    f"groups must divide the channels of every level; got {self.groups} for {channels} "
                    f"(channels {self.channels}, multipliers {self.multipliers})"
                )
        if self.rates and (len(self.rates) > 8 or self.rate not in (0, *self.rates)):
            raise ValueError(f"rate must be one of the rates, of at most 8; got {self.rate} of {self.rates}")
        side = self.rate or self.patch * 2 ** (len(self.multipliers) - 1)
        if self.resolution % side:
            raise ValueError(
                f"resolution must be a multiple of the {side} pixels that a code stands for (patch "
                f"{self.patch}, multipliers {self.multipliers}, rate {self.rate}); got {self.resolution}"
            )

    @property
    def grid(self) -> int:
        """Codes a side of an image."""
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
        y: Tensor = self.shortcut(x) + h
        return y


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
        y: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, c, h, w)
        y = self.out(y)
        return x + y


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))  # pads right and bottom only
        return y


class ResidualDownsample(Downsample):
    """The strided convolution plus an average."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) + super().forward(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y


def _middle(channels: int, config: VQVAEConfig) -> list[nn.Module]:
    attention = (
        [AttentionBlock(channels, config.groups)] if config.mid_attention else []
    )  # first to be seeded
    return [
        ResidualBlock(channels, channels, config.groups),
        *attention,
        ResidualBlock(channels, channels, config.groups),
    ]


def _level(width: int, outputs: int, blocks: int, attended: bool, groups: int) -> list[nn.Module]:
    """The residual blocks of one level, from `width` channels to `outputs`."""
    layers: list[nn.Module] = []
    for number in range(blocks):
        layers.append(ResidualBlock(outputs if number else width, outputs, groups))
        if attended:
            layers.append(AttentionBlock(outputs, groups))
    return layers


def _encoder(config: VQVAEConfig) -> nn.Sequential:
    width = config.channels * config.multipliers[0]
    layers: list[nn.Module] = [nn.Conv2d(3 * config.patch**2, width, 3, padding=1)]
    if config.patch > 1:
        layers.insert(0, nn.PixelUnshuffle(config.patch))
    for level, multiplier in enumerate(config.multipliers):
        if level > 0:
            layers.append(Downsample(width))
        outputs = config.channels * multiplier
        layers += _level(width, outputs, config.encoder_blocks, level in config.attended, config.groups)
        width = outputs
    layers += _middle(width, config)
    layers += [
        nn.GroupNorm(config.groups, width, eps=1e-6),
        nn.SiLU(),
        nn.Conv2d(width, config.code_width, 3, padding=1),
    ]
    return nn.Sequential(*layers)


def _decoder(config: VQVAEConfig, multipliers: tuple[int, ...]) -> nn.Sequential:
    width = config.channels * multipliers[-1]
    layers: list[nn.Module] = [nn.Conv2d(config.code_width, width, 3, padding=1)]
    layers += _middle(width, config)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        outputs = config.channels * multiplier
        layers += _level(width, outputs, config.decoder_blocks, level in config.attended, config.groups)
        width = outputs
        if level > 0:
            layers.append(Upsample(width))
    layers += [
        nn.GroupNorm(config.groups, width, eps=1e-6),
        nn.SiLU(),
        nn.Conv2d(width, 3 * config.patch**2, 3, padding=1),
    ]
    if config.patch > 1:
        layers.append(nn.PixelShuffle(config.patch))
    return nn.Sequential(*layers)


def decoder_of(config: VQVAEConfig) -> nn.Sequential:
    """New layers from code vectors to images, as the tokenizer has them."""
    return _decoder(config, config.multipliers)


class Peers(Protocol):
    """The processes that train one codebook together."""

    @property
    def first(self) -> bool:
        """Whether this is the process that computes updates."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """[M, ...] of every process, in their order; all of them call this."""
        ...

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of the first process; all of them call this."""
        ...


class Codebook(nn.Module):
    """Nearest-neighbour quantiser whose codes are moving averages of the vectors that chose them.

    `decay` is that of the average. A code whose cluster size, averaged over batches, falls below `dead` is
    moved to a random vector of the batch. Until `init_codes` is called, vectors pass through unquantised
    (`filled` is False). Buffers keep the names that stored models have; `uses` is the cluster size.

    With `peers`, the first process updates the codes by the vectors of all, and the others take the result,
    so that all hold the same codes.
    """

    def __init__(self, codes: int, width: int, decay: float = 0.99, dead: float = 0.02):
        super().__init__()
        self.decay = decay
        self.dead = dead
        self.peers: Peers | None = None
        self.vectors: Tensor
        self.uses: Tensor
        self.sums: Tensor
        self.filled: Tensor
        self.register_buffer("vectors", torch.zeros(codes, width))
        self.register_buffer("uses", torch.ones(codes))  # cluster size: average number of vectors a batch
        self.register_buffer("sums", torch.zeros(codes, width))
        self.register_buffer("filled", torch.tensor(False))

    def nearest(self, z: Tensor) -> Tensor:
        """z [M, C] to the ids [M] of the nearest codes."""
        return self._distances(z).argmin(1)

    def perturb(self, ids: Tensor, share: float, seeds: Sequence[int]) -> Tensor:
        """Replace about `share` of the ids [B, M], each by one of the `NEIGHBOURS` nearest (RobusTok, 2025).

        Models often sample a code that is nearly right, and a decoder trained on such codes tolerates it. Row
        i depends on seed i only, not on its batch.
        """
        changed = ids.clone()
        for row, seed in zip(changed, seeds):
            generator = torch.Generator().manual_seed(seed)
            chosen = (torch.rand(len(row), generator=generator) < share).to(ids.device)
            distances = self._distances(self.vectors[row[chosen]])
            near = distances.topk(NEIGHBOURS + 1, largest=False).indices[:, 1:]
            rank = torch.randint(NEIGHBOURS, (len(near), 1), generator=generator).to(ids.device)
            row[chosen] = near.gather(1, rank).squeeze(1)
        return changed

    def _distances(self, z: Tensor) -> Tensor:
        """Squared distances of z [M, C] to all codes, [M, V], minus |z|^2; always in float32."""
        with torch.autocast(z.device.type, enabled=False):
            return self.vectors.square().sum(1) - 2 * z.float() @ self.vectors.T

    @torch.no_grad()
    def init_codes(self, z: Tensor, generator: torch.Generator | None = None) -> None:
        """Set the codes to random vectors of z [M, C], each used once unless there are more codes than M."""
        if self.peers is None:
            self._init_codes(z, generator)
            return
        z = self.peers.gather(z)
        if self.peers.first:
            self._init_codes(z, generator)
        self.peers.broadcast(self.buffers())

    @torch.no_grad()
    def update(self, z: Tensor, ids: Tensor, generator: torch.Generator | None = None) -> None:
        """EMA update: move the codes towards the vectors z [M, C] that chose them; replace the dead ones."""
        if self.peers is None:
            self._update(z, ids, generator)
            return
        z = self.peers.gather(z)
        ids = self.peers.gather(ids)
        if self.peers.first:
            self._update(z, ids, generator)
        self.peers.broadcast(self.buffers())

    def _init_codes(self, z: Tensor, generator: torch.Generator | None) -> None:
        vectors = z[_random_rows(len(z), len(self.vectors), generator)]
        self.vectors.copy_(vectors)
        self.sums.copy_(vectors)
        self.uses.fill_(1.0)
        self.filled.fill_(True)

    def _update(self, z: Tensor, ids: Tensor, generator: torch.Generator | None) -> None:
        cluster_size = torch.bincount(ids, minlength=len(self.vectors)).to(z.dtype)
        self.uses.lerp_(cluster_size, 1 - self.decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, ids, z), 1 - self.decay)
        self.vectors.copy_(self.sums / self.uses.clamp_min(1e-5).unsqueeze(1))

        dead = (self.uses < self.dead).nonzero().squeeze(1)
        if len(dead):
            vectors = z[_random_rows(len(z), len(dead), generator)]
            self.vectors[dead] = vectors
            self.sums[dead] = vectors
            self.uses[dead] = 1.0


def _random_rows(population: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` random numbers below `population`, each as often as the others, plus or minus once."""
    order = torch.randperm(population, generator=generator)
    return order.repeat(-(-count // population))[:count]


class VQVAE(nn.Module):
    """`encode` images to codes, `decode` codes to images; images are float [B, 3, R, R] in [0, 1]."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.codebook = Codebook(config.codes, config.code_width)
        self.decoder = decoder_of(config)

    def _normalise(self, images: Tensor) -> Tensor:
        mean = constant(self.config.mean, images).view(3, 1, 1)
        std = constant(self.config.std, images).view(3, 1, 1)
        return (images - mean) / std

    def _denormalise(self, x: Tensor) -> Tensor:
        mean = constant(self.config.mean, x).view(3, 1, 1)
        std = constant(self.config.std, x).view(3, 1, 1)
        return x * std + mean

    def latents(self, images: Tensor) -> Tensor:
        """[B, 3, R, R] to encoder outputs before quantisation [B, C, grid, grid]."""
        z: Tensor = self.encoder(self._normalise(images))
        return z

    def rebuild(self, z: Tensor) -> Tensor:
        """Code vectors [B, C, grid, grid] to images [B, 3, R, R], not clamped."""
        return self._denormalise(self.decoder(z).float())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, R, R] in [0, 1] to ids [B, N], raster order."""
        z = self.latents(images).float().permute(0, 2, 3, 1)  # [B, grid, grid, C]
        return self.codebook.nearest(z.flatten(0, 2)).view(len(z), -1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """ids [B, N] to images [B, 3, R, R], clamped to [0, 1]."""
        return self.rebuild(self.vectors(ids).to(self.dtype)).clamp(0, 1)

    def vectors(self, ids: Tensor) -> Tensor:
        """ids [B, N] to the vectors of their codes [B, C, grid, grid]."""
        side = math.isqrt(ids.shape[1])
        return self.codebook.vectors[ids.reshape(-1, side, side)].permute(0, 3, 1, 2)

    def forward(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        perturb: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct for training: (reconstruction [B, 3, R, R], commitment loss, ids [B * N]).

        In training mode a share `perturb` of the codes that the decoder sees is replaced by near ones,
        by each image's seed.

        Gradients pass straight through the quantiser. In training mode the codebook is updated. Before the
        codebook is initialised, the reconstruction is that of the unquantised latents and the commitment loss
        is 0.
        """
        z = self.latents(images).float()  # [B, C, g, g]
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)  # [B * N, C]
        if not self.codebook.filled:
            ids = flat.new_zeros(len(flat), dtype=torch.long)
            return self.rebuild(z), z.new_zeros(()), ids

        ids = self.codebook.nearest(flat.detach())
        target = self.vectors(ids.view(len(z), -1))
        loss = F.mse_loss(z, target)
        if perturb and self.training:
            target = self.vectors(self.codebook.perturb(ids.view(len(z), -1), perturb, seeds))
        quantised = z + (target - z).detach()
        if self.training:
            self.codebook.update(flat.detach(), ids, generator)
        return self.rebuild(quantised), loss, ids

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class HierarchicalVQVAE(VQVAE):
    """The image tokenizer of icetk (docs/reference.md, "icetk"): one codebook for the downsampling
    factors 4, 8 and 16.

    The encoder reaches the first factor, and each further factor halves the map once more. A code of factor r
    stands for r x r pixels; images may have any size that r divides. A factor of 0 is the configured one.
    """

    def __init__(self, config: VQVAEConfig):
        nn.Module.__init__(self)
        self.config = config
        self.encoder = _encoder(config)
        self.halves = nn.ModuleList(ResidualDownsample(config.code_width) for _ in config.rates[1:])
        self.project = nn.Conv2d(config.code_width, config.code_width, 1)
        self.codebook = Codebook(config.codes, config.code_width)
        # a decoder for a larger factor has more levels, with as many channels as the first
        self.decoders = nn.ModuleList(
            _decoder(config, (1,) * level + config.multipliers) for level in range(len(config.rates))
        )

    def _level(self, factor: int) -> int:
        factor = factor or self.config.rate
        if factor not in self.config.rates:
            choices = ", ".join(map(str, self.config.rates))
            raise ValueError(f"no downsampling factor {factor}; choose one of {choices}")
        return self.config.rates.index(factor)

    def latents(self, images: Tensor, factor: int = 0) -> Tensor:
        """[B, 3, H, W] to encoder outputs before quantisation [B, C, H / factor, W / factor]."""
        z: Tensor = self.encoder(self._normalise(images))
        for halve in self.halves[: self._level(factor)]:
            z = halve(z)
        z = self.project(z)
        return z

    @torch.no_grad()
    def encode(self, images: Tensor, factor: int = 0) -> Tensor:
        """[B, 3, H, W] in [0, 1] to ids [B, N], raster order."""
        z = self.latents(images.to(self.dtype), factor).float().permute(0, 2, 3, 1)  # [B, h, w, C]
        return self.codebook.nearest(z.flatten(0, 2)).view(len(z), -1)

    def rebuild(self, z: Tensor, factor: int = 0) -> Tensor:
        """Code vectors [B, C, h, w] to images [B, 3, h * factor, w * factor], not clamped."""
        return self._denormalise(self.decoders[self._level(factor)](z).float())

    @torch.no_grad()
    def decode(self, ids: Tensor, factor: int = 0) -> Tensor:
        """ids [B, N] of square maps, of any size, to images [B, 3, R, R], clamped to [0, 1]."""
        side = math.isqrt(ids.shape[1])
        assert side * side == ids.shape[1], f"{ids.shape[1]} codes are no square map"
        z = self.vectors(ids).to(self.dtype)
        # one by one: the largest maps of a large image take much memory
        return torch.cat([self.rebuild(rows, factor) for rows in z.split(1)]).clamp(0, 1)


def to_images(frames: np.ndarray) -> Tensor:
    """Frames uint8 [..., H, W, 3] to images float [..., 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 255


def to_frames(images: Tensor) -> Frames:
    """Images float [..., 3, H, W], clamped to [0, 1], to frames uint8 [..., H, W, 3]."""
    return (images.float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()

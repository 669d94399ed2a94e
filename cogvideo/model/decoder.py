"""The video decoder: codes of a clip to frames, each seen with its neighbours in time and with the caption.

It starts as a copy of the tokenizer's decoder, which knows one frame at a time, and gains two kinds of layers
that begin as nothing: `TimeMixer` looks at the frames before and after, `TextReader` at the words. Notable:
- Decoding frame by frame is where most flicker comes from; temporal layers in the decoder alone cure it, with
  the encoder untouched (Blattmann 2023, Video LDM).
- The caption says what the codes mean where they are wrong, as in CogView2's super-resolution (Ding 2022).
- Mixing is local in time, so a clip of any length is decoded in one pass, and frames beyond the ends are
  repeated.

Shapes: B clips, F frames, N = g * g codes, C channels, T text tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.hardware import constant
from cogvideo.model.vqvae import VQVAE, ResidualBlock, VQVAEConfig, decoder_of


@dataclass(frozen=True)
class DecoderConfig:
    pieces: int  # text ids, counted from the first one of text
    first_text: int  # the first id of text
    pad: int  # id of padding
    text_len: int = 32  # tokens of a caption
    heads: int = 4
    read: int = 3  # residual blocks, from the codes on, that are followed by a look at the caption
    mix: bool = True  # whether every residual block is followed by a look at the frames before and after


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that begins by giving 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class TimeMixer(nn.Module):
    """Adds to each frame what it takes from itself and its two neighbours, place by place."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.mix = zeroed(nn.Conv2d(3 * channels, channels, 1))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """[B * F, C, h, w] to the same."""
        h = F.silu(self.norm(x)).unflatten(0, (-1, frames))  # [B, F, C, h, w]
        before = torch.cat((h[:, :1], h[:, :-1]), 1)
        after = torch.cat((h[:, 1:], h[:, -1:]), 1)
        return x + self.mix(torch.cat((before, h, after), 2).flatten(0, 1))


class TextReader(nn.Module):
    """Adds to each place of a frame what it reads in the caption: attention to the embedded words."""

    def __init__(self, channels: int, width: int, heads: int, groups: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.query = nn.Conv2d(channels, channels, 1)
        self.pair = nn.Linear(width, 2 * channels)  # keys and values
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, words: Tensor, bias: Tensor, frames: int) -> Tensor:
        """x [B * F, C, h, w], words [B, T, W], bias [B, T] (0, or -inf on padding), to the same as x."""
        _, channels, height, width = x.shape
        q = self.query(self.norm(x)).unflatten(0, (-1, frames)).flatten(3)  # [B, F, C, h * w]
        q = q.movedim(2, 3).flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, H, F h w, d]
        k, v = self.pair(words).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, d]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None, :].to(q.dtype))
        y = y.transpose(1, 2).flatten(2).unflatten(1, (frames, -1)).flatten(0, 1)  # [B * F, h * w, C]
        return x + self.out(y.transpose(1, 2).reshape(-1, channels, height, width))


class VideoDecoder(nn.Module):
    """`forward(z, text)`: vectors of codes [B, F, C, g, g] and text ids [B, T] to clips [B, F, 3, R, R].

    Pixels are in [0, 1], not clamped.
    """

    def __init__(self, vqvae: VQVAEConfig, config: DecoderConfig):
        super().__init__()
        self.vqvae, self.config = vqvae, config
        self.frame = decoder_of(vqvae)
        widths = {i: block.conv2.out_channels for i, block in self._blocks()}
        width = vqvae.channels * vqvae.multipliers[-1]
        self.words = nn.Embedding(config.pieces, width)
        nn.init.normal_(self.words.weight, std=0.5)
        readers = list(widths)[: config.read]
        mixed = widths if config.mix else {}
        self.mixers = nn.ModuleDict({str(i): TimeMixer(c, vqvae.groups) for i, c in mixed.items()})
        self.readers = nn.ModuleDict(
            {str(i): TextReader(widths[i], width, config.heads, vqvae.groups) for i in readers}
        )

    def _blocks(self) -> list[tuple[int, ResidualBlock]]:
        return [(i, block) for i, block in enumerate(self.frame) if isinstance(block, ResidualBlock)]

    @torch.no_grad()
    def inherit(self, vqvae: VQVAE) -> None:
        """Start as the tokenizer's decoder: the new layers add nothing yet."""
        self.frame.load_state_dict(vqvae.decoder.state_dict())

    def forward(self, z: Tensor, text: Tensor) -> Tensor:
        frames = z.shape[1]
        words = self.words((text - self.config.first_text).clamp(0, self.config.pieces - 1))  # [B, T, W]
        bias = torch.zeros_like(text, dtype=torch.float32).masked_fill(text == self.config.pad, float("-inf"))
        x = z.flatten(0, 1)
        for i, layer in enumerate(self.frame):
            x = layer(x)
            if str(i) in self.readers:
                x = self.readers[str(i)](x, words, bias, frames)
            if str(i) in self.mixers:
                x = self.mixers[str(i)](x, frames)
        x = x.float()
        mean, std = (constant(v, x).view(3, 1, 1) for v in (self.vqvae.mean, self.vqvae.std))
        return (x * std + mean).unflatten(0, (-1, frames))

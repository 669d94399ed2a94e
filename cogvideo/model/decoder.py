"""The video decoder: codes of a clip to frames, using neighbouring frames and the caption.

It starts as a copy of the tokenizer's decoder, which decodes single frames, and adds two kinds of layers that
initially add zero: `TimeMixer` uses the previous and the next frame, `TextReader` the words. Notable:
- Most flicker comes from decoding frame by frame; temporal layers in the decoder alone remove it, with the
  encoder unchanged (Blattmann 2023, Video LDM).
- Where codes are wrong, the caption says what is meant, as in CogView2's super-resolution (Ding 2022).
- Mixing is local in time, so a clip of any length is decoded in one pass; the first and the last frame are
  repeated beyond the ends.

Shapes: B clips, F frames, N = g * g codes, C channels, T text tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.hardware import constant
from cogvideo.model.config import Id, Ids, Size, SmallCount, SmallSize
from cogvideo.model.vqvae import VQVAE, ResidualBlock, VQVAEConfig, decoder_of


@dataclass(frozen=True)
class DecoderConfig:
    pieces: Ids  # text ids, counted from the first one of text
    first_text: Id  # the first id of text
    pad: Id  # id of padding
    text_len: Size = 32  # tokens of a caption
    heads: SmallSize = 4
    read: SmallCount = 3  # residual blocks, from the codes on, that are followed by a look at the caption
    mix: bool = True  # whether every residual block is followed by a look at the frames before and after


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Set a layer's weights to 0, so that it initially returns 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class TimeMixer(nn.Module):
    """Adds to each frame a linear mix of itself and its two neighbours, position by position."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.mix = zeroed(nn.Conv2d(3 * channels, channels, 1))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """[B * F, C, h, w] to the same."""
        h = F.silu(self.norm(x)).unflatten(0, (-1, frames))  # [B, F, C, h, w]
        previous = torch.cat((h[:, :1], h[:, :-1]), 1)
        following = torch.cat((h[:, 1:], h[:, -1:]), 1)
        y: Tensor = self.mix(torch.cat((previous, h, following), 2).flatten(0, 1))
        return x + y


class TextReader(nn.Module):
    """Adds to each position of a frame its attention to the embedded words of the caption."""

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
        y: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None, :].to(q.dtype))
        y = y.transpose(1, 2).flatten(2).unflatten(1, (frames, -1)).flatten(0, 1)  # [B * F, h * w, C]
        y = self.out(y.transpose(1, 2).reshape(-1, channels, height, width))
        return x + y


class VideoDecoder(nn.Module):
    """`forward(z, text)`: vectors of codes [B, F, C, g, g] and text ids [B, T] to clips [B, F, 3, R, R].

    Pixels are in [0, 1], not clamped.
    """

    def __init__(self, vqvae: VQVAEConfig, config: DecoderConfig):
        super().__init__()
        self.vqvae = vqvae
        self.config = config
        self.frame = decoder_of(vqvae)
        widths = {i: block.conv2.out_channels for i, block in self._blocks()}
        width = vqvae.channels * vqvae.multipliers[-1]
        self.words = nn.Embedding(config.pieces, width)
        nn.init.normal_(self.words.weight, std=0.5)
        mixed = list(widths) if config.mix else []
        read = list(widths)[: config.read]
        self.mixers = nn.ModuleDict({str(i): TimeMixer(widths[i], vqvae.groups) for i in mixed})
        self.readers = nn.ModuleDict(
            {str(i): TextReader(widths[i], width, config.heads, vqvae.groups) for i in read}
        )

    def _blocks(self) -> list[tuple[int, ResidualBlock]]:
        return [(i, block) for i, block in enumerate(self.frame) if isinstance(block, ResidualBlock)]

    @torch.no_grad()
    def inherit(self, vqvae: VQVAE) -> None:
        """Copy the tokenizer's decoder; the new layers still add zero."""
        self.frame.load_state_dict(vqvae.decoder.state_dict())

    def shared_rows(self, other: "VideoDecoder", same_words: bool) -> dict[str, list[tuple[int, int]]]:
        """The rows of words with the same meaning, here and in another decoder: all or none."""
        count = min(self.config.pieces, other.config.pieces) if same_words else 0
        return {"words.weight": [(i, i) for i in range(count)]}

    def forward(self, z: Tensor, text: Tensor) -> Tensor:
        """Code vectors [B, F, C, g, g] and text ids [B, T] to clips [B, F, 3, R, R]."""
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
        mean = constant(self.vqvae.mean, x).view(3, 1, 1)
        std = constant(self.vqvae.std, x).view(3, 1, 1)
        clips: Tensor = (x * std + mean).unflatten(0, (-1, frames))
        return clips

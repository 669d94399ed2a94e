"""A plain GPT over the codes of all frames, in raster order: the obvious alternative to the paper's method.

Text, then 33 frames of 256 codes, each token after all before it: one causal attention over 8,480 positions.
Blocks, positions (rotary by time, row and column), head and optimizer are those of ours, so that the
difference is the method: no image model to inherit, no second channel, no frame rates.

Shapes: B clips, T text, S = 33 * N frame tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.contest import TIMES, to_clips
from benchmarks.rivals.stepwise import Stepwise
from cogvideo.generate.sampling import Sampling, sample, uniforms
from cogvideo.hardware import has_fast_bfloat16
from cogvideo.model.attention import Attention, rotary_table
from cogvideo.model.transformer import Base, TransformerConfig
from cogvideo.video import Clip

FRAMES = len(TIMES)


class WholeView:
    """All tokens at once: each sees those before it."""

    def __init__(self, rotary: Tensor, text_len: int):
        self.rotary = rotary
        self.text_len = text_len

    def attend(self, attention: Attention, qkv: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = qkv
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return y[:, : self.text_len], y[:, self.text_len :]


class NextView:
    """New tokens after those whose keys and values are kept; the first call takes the text."""

    def __init__(self, rotary: Tensor, kept: dict[int, Tensor], start: int):
        self.rotary = rotary
        self.kept = kept  # by layer: [2, B, H, longest, d]
        self.start = start

    def attend(self, attention: Attention, qkv: Tensor) -> tuple[None, Tensor]:
        q, k, v = qkv
        end = self.start + q.shape[2]
        kept = self.kept[attention.layer]
        kept[0, :, :, self.start : end] = k
        kept[1, :, :, self.start : end] = v
        k, v = kept[:, :, :, :end]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return None, y.transpose(1, 2).flatten(2)


class RasterGPT(nn.Module):
    """`forward(text, codes)`: ids [B, T] and codes [B, S] to logits [B, S, V] of every code."""

    def __init__(self, config: TransformerConfig, frames: int = FRAMES):
        super().__init__()
        self.config = config
        self.frames = frames
        self.base = Base(config)

    @lru_cache(1)  # noqa: B019
    def rotary(self) -> Tensor:
        """[2, T + S, d]: text is not rotated."""
        c = self.config
        raster = torch.arange(c.frame_tokens).repeat(self.frames)
        time_ = torch.arange(self.frames).repeat_interleave(c.frame_tokens)
        axes = torch.stack((time_, raster // c.grid, raster % c.grid), 1)
        return rotary_table(F.pad(axes, (0, 0, c.text_len, 0)), c.width // c.heads)

    def embed(self, text: Tensor, inputs: Tensor, start: int = 0) -> Tensor:
        """Text and inputs from frame token `start` on, with their positions [B, T + m, D]."""
        c = self.config
        places = torch.arange(start, start + inputs.shape[1]) % c.frame_tokens + c.first_frame
        positions = self.base.positions(torch.cat((torch.arange(text.shape[1]), places)))
        return self.base.embed(torch.cat((text, inputs), 1)) + positions

    def forward(self, text: Tensor, codes: Tensor) -> Tensor:
        inputs = torch.cat((torch.full_like(codes[:, :1], self.config.start), codes[:, :-1]), 1)
        x = self.embed(text, inputs)
        view = WholeView(self.rotary()[:, : x.shape[1]], text.shape[1])
        for block in self.base.blocks:
            x = block(x, view)
        return self.base.head(self.base.norm(x[:, text.shape[1] :])).float()

    @torch.inference_mode()
    def generate(self, text: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
        """Ids [B, T] and random numbers [B, S] to codes [B, S]."""
        c = self.config
        count = self.frames * c.frame_tokens
        shape = (2, len(text), c.heads, c.text_len + count, c.width // c.heads)
        kept = {layer: torch.zeros(shape) for layer in range(c.layers)}
        x = self.embed(text, text[:, :0])
        for block in self.base.blocks:
            x = block(x, NextView(self.rotary()[:, : c.text_len], kept, 0))

        codes = torch.zeros(len(text), count, dtype=torch.long)
        token = torch.full((len(text), 1), c.start)
        for i in range(count):
            position = c.text_len + i
            x = self.embed(text[:, :0], token, i)
            view = NextView(self.rotary()[:, position : position + 1], kept, position)
            for block in self.base.blocks:
                x = block(x, view)
            logits = self.base.head(self.base.norm(x))[:, 0].float()
            codes[:, i] = sample(logits, sampling, uniform[:, i])
            token = codes[:, i : i + 1]
        return codes


class Raster(Stepwise[RasterGPT]):
    name = "raster"
    lr = 7e-4
    batch = 2
    fresh = 2

    @property
    def config(self) -> TransformerConfig:
        return replace(self.size.spec.model, skew=0)

    def new(self, seed: int) -> RasterGPT:
        torch.manual_seed(seed)
        model = RasterGPT(self.config)
        model.base.init_weights(torch.Generator().manual_seed(seed))
        return model

    def prepare(self, frames: np.ndarray) -> Tensor:
        return self.encode(frames).flatten()

    def loss(self, model: RasterGPT, captions: list[str], clips: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16(torch.device("cpu"))):
            logits = model(self.ids(captions), clips)
            return F.cross_entropy(logits.flatten(0, 1), clips.flatten())

    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Clip]:
        c = self.config
        uniform = uniforms(seeds, FRAMES * c.frame_tokens, 0)
        sampling = Sampling(temperature=1.0, top_k=50)
        codes = self.trained.generate(self.ids(captions), sampling, uniform)
        return to_clips(self.vqvae, codes.view(len(codes), FRAMES, -1), captions)

"""A latent diffusion transformer over all frames at once: CogVideoX in miniature, by the package `diffusers`.

The transformer of CogVideoX (full attention over text and video, expert norms, 3-D rotary positions) denoises
the code vectors of all 33 frames; schedule (zero terminal SNR, v-prediction), sampler and guidance are those
of the released models. The tokenizer stands in for the video autoencoder: what is sampled is rounded to the
nearest codes.

Shapes: B clips, F = 33 frames, C channels of a code vector, g codes a side.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.contest import TIMES, to_clips
from benchmarks.rivals.stepwise import CaptionEncoder, Stepwise
from cogvideo.hardware import has_fast_bfloat16
from cogvideo.video import Clip

if TYPE_CHECKING:
    from diffusers import CogVideoXDDIMScheduler

FRAMES = len(TIMES)
PATCH = 2  # codes a side of a token
DROP = 0.1  # share of captions that are dropped in training
GUIDANCE = 6.0
STEPS = 50


class Denoiser(nn.Module):
    """`forward(latents, ids, t)`: noisy latents [B, F, C, g, g] and captions to velocities."""

    def __init__(self, width: int, layers: int, channels: int, grid: int, text: CaptionEncoder):
        super().__init__()
        from diffusers import CogVideoXTransformer3DModel

        self.text = text
        self.grid = grid
        self.transformer = CogVideoXTransformer3DModel(
            num_attention_heads=max(1, width // 64),
            attention_head_dim=64,
            in_channels=channels,
            out_channels=channels,
            time_embed_dim=width,
            text_embed_dim=width,
            num_layers=layers,
            sample_width=grid,
            sample_height=grid,
            sample_frames=FRAMES,
            patch_size=PATCH,
            temporal_compression_ratio=1,
            max_text_seq_length=len(text.positions),
            use_rotary_positional_embeddings=True,
        )

    @cached_property
    def rotary(self) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        side = self.grid // PATCH
        cosine, sine = get_3d_rotary_pos_embed(64, ((0, 0), (side, side)), (side, side), FRAMES)
        return cosine, sine

    def forward(self, latents: Tensor, ids: Tensor, t: Tensor) -> Tensor:
        states = self.text(ids)
        made: Tensor = self.transformer(latents, states, t, image_rotary_emb=self.rotary, return_dict=False)[
            0
        ]
        return made


class Diffusion(Stepwise[Denoiser]):
    name = "diffusion"
    lr = 2e-3
    optimizer = "adamw"
    batch = 4

    def new(self, seed: int) -> Denoiser:
        torch.manual_seed(seed)
        c = self.size.spec.model
        text = CaptionEncoder(c.vocab, c.pad, c.text_len, self.size.width)
        return Denoiser(self.size.width, self.size.layers, self._codes.shape[1], c.grid, text)

    def prepare(self, frames: np.ndarray) -> Tensor:
        return self.encode(frames)

    def loss(self, model: Denoiser, captions: list[str], clips: Tensor) -> Tensor:
        latents = self._latents(clips)
        t = torch.randint(self._scheduler.config.num_train_timesteps, (len(clips),))
        noise = torch.randn_like(latents)
        noisy = self._scheduler.add_noise(latents, noise, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16(torch.device("cpu"))):
            made = model(noisy, self._ids(captions), t)
        return F.mse_loss(made.float(), self._scheduler.get_velocity(latents, noise, t))

    def _ids(self, captions: Sequence[str]) -> Tensor:
        return self.ids(["" if torch.rand(()) < DROP else caption for caption in captions])

    @torch.inference_mode()
    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Clip]:
        c = self.size.spec.model
        shape = (FRAMES, self._codes.shape[1], c.grid, c.grid)
        latents = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        ids = torch.cat((self.ids([""] * len(captions)), self.ids(captions)))
        scheduler = self._scheduler
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            times = t.expand(len(ids))
            with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16(torch.device("cpu"))):
                free, guided = self.trained(torch.cat((latents, latents)), ids, times).float().chunk(2)
            velocity = free + GUIDANCE * (guided - free)
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        return to_clips(self.vqvae, self._nearest(latents), captions)

    # -- latents: code vectors of mean 0 and variance 1 --

    @cached_property
    def _codes(self) -> Tensor:
        """The vectors of all codes, normalised [V, C]."""
        vectors = self.vqvae.codebook.vectors
        return (vectors - vectors.mean(0)) / vectors.std(0)

    def _latents(self, codes: Tensor) -> Tensor:
        """Codes [B, F, N] to [B, F, C, g, g]."""
        g = self.size.spec.model.grid
        return self._codes[codes].unflatten(2, (g, g)).permute(0, 1, 4, 2, 3)

    def _nearest(self, latents: Tensor) -> Tensor:
        """[B, F, C, g, g] to the nearest codes [B, F, N]."""
        flat = latents.permute(0, 1, 3, 4, 2).flatten(0, 3)
        nearest = torch.cdist(flat, self._codes).argmin(1)
        return nearest.view(len(latents), FRAMES, -1)

    @cached_property
    def _scheduler(self) -> "CogVideoXDDIMScheduler":
        from diffusers import CogVideoXDDIMScheduler

        return CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
            snr_shift_scale=3.0,
        )

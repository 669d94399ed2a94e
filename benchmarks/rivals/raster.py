"""A plain GPT over the codes of all frames, in raster order: the obvious alternative to the paper's method.

Text, then 33 frames of 256 codes, each token after all before it: one causal attention over 8,480 positions.
Blocks, positions (rotary by time, row and column), head and optimizer are those of ours, so that the
difference is the method: no image model to inherit, no second channel, no frame rates.

Shapes: B clips, T text, S = 33 * N frame tokens, D width.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.contest import TIMES, System, to_clips
from cogvideo.data.loader import read_captions
from cogvideo.data.tinyworld import TinyWorld
from cogvideo.files import atomic_path, write_json
from cogvideo.generate.sampling import Sampling, sample, uniforms
from cogvideo.layout import SECONDS
from cogvideo.model.attention import Attention, rotary_table
from cogvideo.model.folder import ModelFolder, find_model
from cogvideo.model.transformer import Base, TransformerConfig
from cogvideo.model.vqvae import VQVAE, to_images
from cogvideo.text import TextTokenizer, train_text
from cogvideo.train.optim import optimizers, set_learning_rate
from cogvideo.video import Clip

FRAMES = len(TIMES)
LR = 7e-4
BATCH = 2  # clips a step
SAVE_SECONDS = 60.0


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


class Raster(System):
    name = "raster"

    @property
    def config(self) -> TransformerConfig:
        return replace(self.size.spec.model, skew=0)

    def _new(self, seed: int) -> RasterGPT:
        torch.manual_seed(seed)
        model = RasterGPT(self.config)
        model.base.init_weights(torch.Generator().manual_seed(seed))
        return model

    @property
    def _vqvae(self) -> VQVAE:
        return ModelFolder(find_model(self.size.model)).load_as(VQVAE, "vqvae")

    def _text(self, seed: int) -> TextTokenizer:
        """A text model of the captions of these sprites, trained once."""
        file = self.out / "text.model"
        if not file.exists():
            world = TinyWorld(self.size.names, seed, even=True, varied=True)
            with atomic_path(file) as part:
                part.write_bytes(train_text(list(read_captions(world, 10_000, seed)), 1280))
        return TextTokenizer.load(file, self.config.codes)

    def train(self, minutes: float, lr: float | None, seed: int) -> None:
        """The learning rate rises for a hundredth of the time and falls to 0 over the last third."""
        self.out.mkdir(parents=True, exist_ok=True)
        text, vqvae, model = self._text(seed), self._vqvae, self._new(seed)
        model.train()
        optims = optimizers(model, "muon", 0.01, (0.9, 0.95))
        step, spent = self._resume(model, optims)
        world = TinyWorld(self.size.names, seed, even=True, varied=True)
        saved = spent
        while spent < 60 * minutes:
            started = time.process_time()
            share = spent / (60 * minutes)
            rate = (lr or LR) * min(1.0, (share + 1e-3) / 0.01) * min(1.0, (1 - share) * 3)
            set_learning_rate(optims, rate)
            loss = self._step(model, optims, vqvae, text, world, step)
            step += 1
            spent += time.process_time() - started
            if spent - saved > SAVE_SECONDS or spent >= 60 * minutes:
                self._save(model, optims, step, spent)
                saved = spent
                print(f"raster {step} steps, {spent / 60:.1f} min, loss {loss:.3f}", flush=True)

    def _step(
        self,
        model: RasterGPT,
        optims: list[torch.optim.Optimizer],
        vqvae: VQVAE,
        text: TextTokenizer,
        world: TinyWorld,
        step: int,
    ) -> float:
        ids, codes = [], []
        for k in range(step * BATCH, (step + 1) * BATCH):
            video = world[k]
            ids.append(self._ids(text, video.caption(np.random.default_rng((world.seed, k, 1)))))
            with torch.no_grad():
                frames = video.frames(TIMES, self.size.spec.resolution)
                codes.append(vqvae.encode(to_images(frames)).flatten())
        target = torch.stack(codes)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.tensor(ids), target)
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optims:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _ids(self, text: TextTokenizer, caption: str) -> list[int]:
        length = self.config.text_len
        return text.pad_left(text.prompt(caption, SECONDS)[:length], length)

    def _save(self, model: RasterGPT, optims: list[torch.optim.Optimizer], step: int, spent: float) -> None:
        state = {"model": model.state_dict(), "step": step, "spent": spent}
        state["optims"] = [optimizer.state_dict() for optimizer in optims]
        with atomic_path(self.out / "state.pt") as part:
            torch.save(state, part)
        write_json(self.out / "spent.json", {"steps": step, "seconds": spent})

    def _resume(self, model: RasterGPT, optims: list[torch.optim.Optimizer]) -> tuple[int, float]:
        file = self.out / "state.pt"
        if not file.exists():
            return 0, 0.0
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, values in zip(optims, state["optims"]):
            optimizer.load_state_dict(values)
        return state["step"], state["spent"]

    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Clip]:
        model = self._new(0).eval()
        model.load_state_dict(torch.load(self.out / "state.pt", weights_only=True)["model"])
        text = self._text(0)
        ids = torch.tensor([self._ids(text, caption) for caption in captions])
        c = self.config
        uniform = uniforms(seeds, FRAMES * c.frame_tokens, 0)
        codes = model.generate(ids, Sampling(temperature=1.0, top_k=50), uniform)
        return to_clips(self._vqvae, codes.view(len(codes), FRAMES, -1), captions)

    @property
    def parameters(self) -> int:
        return sum(shape.numel() for shape in self.size.spec.shapes("base").values())

    @property
    def minutes(self) -> float:
        file = self.out / "spent.json"
        return json.loads(file.read_text())["seconds"] / 60 if file.exists() else 0.0

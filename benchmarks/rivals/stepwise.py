"""Systems with a training loop of their own: one module, a loss, a time; killed and resumed at any step."""

import json
import time
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.rivals.contest import TIMES, Size, System
from cogvideo.data.loader import read_captions
from cogvideo.data.tinyworld import TinyWorld
from cogvideo.files import atomic_path, write_json
from cogvideo.layout import SECONDS
from cogvideo.model.folder import ModelFolder, find_model
from cogvideo.model.vqvae import VQVAE, to_images
from cogvideo.text import TextTokenizer, train_text
from cogvideo.train.optim import optimizers, set_learning_rate

SAVE_SECONDS = 60.0
POOL = 512  # the newest clips, from which a step draws what it does not render

Item = TypeVar("Item")
Model = TypeVar("Model", bound=nn.Module)


class Stepwise(System, Generic[Model]):
    """The learning rate rises for a hundredth of the time and falls to 0 over the last third."""

    lr: float
    optimizer: str = "muon"

    def __init__(self, size: Size, out: Path):
        super().__init__(size, out)
        self._pool: dict[int, Tensor] = {}

    @abstractmethod
    def new(self, seed: int) -> Model:
        """An untrained model; the same one for the same seed."""

    @abstractmethod
    def loss(self, model: Model, captions: list[str], clips: Tensor) -> Tensor:
        """The loss of a step, for captions and what `prepare` makes of their clips [B, ...]."""

    @abstractmethod
    def prepare(self, frames: np.ndarray) -> Tensor:
        """What is learnt of a clip of frames uint8 [33, R, R, 3]."""

    resolution = 192  # pixels a side of the frames that `prepare` sees
    batch = 8  # clips a step
    fresh = 1  # of them that are rendered for this step; the others are drawn from the pool

    # -- training --

    def train(self, minutes: float, lr: float | None, seed: int) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        model = self.new(seed)
        model.train()
        optims = optimizers(model, self.optimizer, 0.01, (0.9, 0.95))
        step, spent = self._resume(model, optims)
        world = TinyWorld(self.size.names, seed, even=True, varied=True)
        saved = spent
        total = 60 * minutes
        losses = []
        while spent < total:
            started = time.process_time()
            share = spent / total
            rate = (lr or self.lr) * min(1.0, (share + 1e-3) / 0.01) * min(1.0, (1 - share) * 3)
            set_learning_rate(optims, rate)
            losses.append(self._step(model, optims, world, step))
            step += 1
            spent += time.process_time() - started
            if spent - saved > SAVE_SECONDS or spent >= total:
                self._save(model, optims, step, spent)
                saved = spent
                mean = np.mean(losses[-100:])
                print(f"{self.name} {step} steps, {spent / 60:.1f} min, loss {mean:.3f}", flush=True)

    def _step(
        self, model: Model, optims: Sequence[torch.optim.Optimizer], world: TinyWorld, step: int
    ) -> float:
        torch.manual_seed(1_000_003 * world.seed + step)  # of the noise and of what is masked
        captions, clips = self._draw(world, step)
        loss = self.loss(model, captions, clips)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optims:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _draw(self, world: TinyWorld, step: int) -> tuple[list[str], Tensor]:
        """The clips of a step with new words: `fresh` new ones, and others of the newest `POOL`."""
        rng = np.random.default_rng((world.seed, step))
        newest = (step + 1) * self.fresh
        oldest = max(0, newest - POOL)
        numbers = list(range(newest - self.fresh, newest))
        numbers += rng.integers(oldest, newest, self.batch - self.fresh).tolist()
        for number in [n for n in self._pool if n < oldest]:
            del self._pool[number]
        captions = []
        clips = []
        for number in numbers:
            video = world[number]
            captions.append(video.caption(rng))
            if number not in self._pool:
                self._pool[number] = self.prepare(video.frames(TIMES, self.resolution))
            clips.append(self._pool[number])
        return captions, torch.stack(clips)

    # -- files --

    def _save(self, model: Model, optims: Sequence[torch.optim.Optimizer], step: int, spent: float) -> None:
        state = {"model": model.state_dict(), "step": step, "spent": spent}
        state["optims"] = [optimizer.state_dict() for optimizer in optims]
        with atomic_path(self.out / "state.pt") as part:
            torch.save(state, part)
        write_json(self.out / "spent.json", {"steps": step, "seconds": spent})

    def _resume(self, model: Model, optims: Sequence[torch.optim.Optimizer]) -> tuple[int, float]:
        file = self.out / "state.pt"
        if not file.exists():
            return 0, 0.0
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, values in zip(optims, state["optims"]):
            optimizer.load_state_dict(values)
        return state["step"], state["spent"]

    @cached_property
    def trained(self) -> Model:
        """The model as it was saved last, for generation."""
        model = self.new(0).eval()
        model.load_state_dict(torch.load(self.out / "state.pt", weights_only=True)["model"])
        return model

    @property
    def minutes(self) -> float:
        file = self.out / "spent.json"
        return json.loads(file.read_text())["seconds"] / 60 if file.exists() else 0.0

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.new(0).parameters())

    # -- what ours has as well: the tokenizer of frames, and words --

    @cached_property
    def vqvae(self) -> VQVAE:
        return ModelFolder(find_model(self.size.model)).load_as(VQVAE, "vqvae")

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 [F, R, R, 3] to codes [F, N]."""
        return self.vqvae.encode(to_images(frames))

    @cached_property
    def text(self) -> TextTokenizer:
        """A text model of the captions of these sprites, trained once."""
        file = self.out / "text.model"
        if not file.exists():
            world = TinyWorld(self.size.names, 0, even=True, varied=True)
            self.out.mkdir(parents=True, exist_ok=True)
            with atomic_path(file) as part:
                part.write_bytes(train_text(list(read_captions(world, 10_000, 0)), 1280))
        return TextTokenizer.load(file, self.size.spec.model.codes)

    def ids(self, captions: Sequence[str]) -> Tensor:
        """Captions to ids [B, T], padded left."""
        length = self.size.spec.model.text_len
        rows = [self.text.prompt(caption, SECONDS)[:length] for caption in captions]
        return torch.tensor([self.text.pad_left(row, length) for row in rows])


class CaptionEncoder(nn.Module):
    """Ids [B, T] to states [B, T, D], zero where padded: what other people's systems read from T5, which
    cannot be had here; it is learnt along with them."""

    def __init__(self, vocab: int, pad: int, length: int, width: int):
        super().__init__()
        self.pad = pad
        self.embed = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        padded = ids == self.pad
        states: Tensor = self.layers(self.embed(ids) + self.positions, src_key_padding_mask=padded)
        return states.masked_fill(padded.unsqueeze(-1), 0.0)

"""Train the token models of `tiny` on one GPU, each for a given number of seconds.

    python -m scripts.on_gpu MODEL OUT base:240 stage1:140 stage2:100

MODEL is a model folder with text and tokenizer (and whatever parts training goes on from), OUT the folder
that parts are written to. The objective is that of `cogvideo train`; what differs is for speed alone:
- Scenes are drawn on the device (`Canvas`); other processes only choose what they show.
- Weights are multiplied and activations kept in bfloat16, with masters in float32.
- A layer is one compiled function, and a whole step, optimizers included, one CUDA graph: the processor does
  next to nothing, and nothing waits for it.
- Muon takes all matrices of a shape at once.
- The learning rate follows the clock, so that a part is done when its time is up.
"""

import argparse
import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cogvideo.data.tinyworld import sprites
from cogvideo.data.tinyworld.canvas import Canvas, views
from cogvideo.data.tinyworld.world import TinyWorld
from cogvideo.layout import SECONDS, Layout
from cogvideo.model.attention import rotary_table, rotate
from cogvideo.model.features import perceptual_distance, weighted
from cogvideo.model.folder import ModelFolder
from cogvideo.model.groups import groups_of
from cogvideo.model.transformer import Base, TemporalChannel, TransformerConfig, text_ranks
from cogvideo.model.vqvae import VQVAE
from cogvideo.text import TextTokenizer
from cogvideo.train.discriminator import NOISE, SLOPE, new_discriminator
from cogvideo.train.losses import HierarchicalLoss, LossWeights, temporal_distance

HALF = torch.bfloat16
MOST_WRONG = 0.5  # largest share of a clip's codes that the decoder sees as the stages would draw them


@dataclass(frozen=True)
class Plan:
    """What a part is trained by."""

    part: str
    rates: tuple[float, ...]
    keep: int  # frames of the five that are used
    batch: int
    lr: float
    crop_share: float = 0.75
    corrupt: float = 0.0
    object_weight: float = 2.0
    drop: float = 0.1
    adversary: float = 0.0
    warmup: int = 100
    decay: float = 0.5  # share of the time, at the end, over which the rate falls to 0


PLANS = {
    "base": Plan("base", (1, 1, 2, 4, 8), 1, 256, 1e-3),
    "stage1": Plan("stage1", (1, 1, 1, 1, 1, 1, 2, 4), 5, 64, 1e-3, corrupt=0.05),
    "stage2": Plan("stage2", (2, 2, 4, 8), 5, 64, 1e-3, corrupt=0.05),
    "decoder": Plan("decoder", (8, 8, 8, 4, 2, 1), 5, 16, 6e-4, object_weight=4.0, warmup=50, decay=1.0),
    "adversary": Plan(
        "decoder", (8, 8, 8, 4, 2, 1), 5, 16, 3e-4, object_weight=4.0, warmup=50, decay=0.8, adversary=0.15
    ),
}


# -- what is seen


class Scenes(Dataset):
    """Batch k of an endless run: what its frames show, its captions as ids, the seconds that it spans."""

    def __init__(self, world: TinyWorld, text: bytes, first_id: int, plan: Plan, text_len: int, seed: int):
        self.world, self.text, self.first_id, self.plan = world, text, first_id, plan
        self.text_len, self.seed = text_len, seed
        self.reader: TextTokenizer | None = None

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        self.reader = self.reader or TextTokenizer(self.text, self.first_id)
        seen, ids, spans = [], [], []
        for number in range(k * self.plan.batch, (k + 1) * self.plan.batch):
            recording, rng = self.world[number], np.random.default_rng((self.seed, number, 1))
            span = 4 / self.plan.rates[rng.integers(len(self.plan.rates))]
            times = rng.uniform(0, SECONDS - span) + np.linspace(0, span, 5)[: self.plan.keep]
            caption = "" if rng.random() < self.plan.drop else recording.caption(rng)
            row = self.reader.prompt(caption, span)[: self.text_len]
            seen.append(views(recording.scene, np.minimum(times, SECONDS)))
            ids.append(self.reader.pad_left(row, self.text_len))
            spans.append(span)
        return torch.from_numpy(np.stack(seen)).float(), torch.tensor(ids), torch.tensor(spans)


@torch.no_grad()
def encode(vqvae: VQVAE, frames: Tensor, chunk: int = 512) -> Tensor:
    """Frames [M, 3, R, R] to codes [M, N]; the encoder is in bfloat16."""
    like = next(vqvae.encoder.parameters())
    parts = [
        vqvae.encode(part.to(like.dtype).contiguous(memory_format=torch.channels_last))
        for part in frames.split(chunk)
    ]
    return torch.cat(parts)


def corners_of(cover: Tensor, side: int, step: int, uniform: Tensor) -> Tensor:
    """[B, 2]: `inputs.crop_corners` for all clips at once, by uniform numbers [B, 2]."""
    found = []
    covered = cover.amax(1) > 0.05  # [B, g, g]
    none = ~covered.any(2).any(1)
    last = cover.shape[-1] - side
    for axis, u in zip((2, 1), uniform.unbind(1)):  # rows, columns
        line = covered.any(axis).float()
        first, final = line.argmax(1), line.shape[1] - 1 - line.flip(1).argmax(1)
        low = torch.minimum(final - side + 1, first).clamp(0, last).masked_fill(none, 0)
        high = torch.maximum(final - side + 1, first).clamp(0, last).masked_fill(none, last)
        corner = low + (u * (high - low + 1)).long()
        found.append((corner + step // 2) // step * step)
    return torch.stack(found, 1)


def window(maps: Tensor, corners: Tensor, side: int) -> Tensor:
    """[B, F, g, g] to [B, F, side * side]."""
    grid = maps.shape[-1]
    rows, columns = (corners[:, :, None] + torch.arange(side, device=maps.device)).unbind(1)
    places = (rows[:, :, None] * grid + columns[:, None]).flatten(1)
    return maps.flatten(2).gather(2, places[:, None].expand(-1, maps.shape[1], -1))


# -- the model, as one function a layer


def normed(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *weights)


def project(
    h: Tensor, qkv: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor], rotary: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = F.linear(h, *qkv).unflatten(-1, (3, heads, -1)).unbind(2)  # [B, S, H, d]
    q, k = (rotate(F.layer_norm(x, x.shape[-1:], w), rotary) for x, w in zip((q, k), norms))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: int,
    mask: Tensor,
    text_mask: Tensor,
    group: tuple | None,
    text_too: bool,
    causal: int,
) -> tuple[Tensor | None, Tensor]:
    """Text to text, frames to text and their group. mask [B * G, 1, n, T + n]; causal: if not 0, queries go
    in chunks of so many, each seeing only keys up to its own end."""
    b, heads, s, d = q.shape
    text = None
    if text_too:
        text = F.scaled_dot_product_attention(q[:, :, :t], k[:, :, :t], v[:, :, :t], text_mask)
        text = text.transpose(1, 2).flatten(2)
    count, n = len(mask) // b, mask.shape[2]

    def grouped(x: Tensor) -> Tensor:
        x = x[:, :, t:]
        x = x if group is None else x.index_select(2, group[0])
        return x.unflatten(2, (count, n)).transpose(1, 2).flatten(0, 1)  # [B * G, H, n, d]

    def before(x: Tensor) -> Tensor:
        return x[:, None, :, :t].expand(-1, count, -1, -1, -1).flatten(0, 1)

    q, (k, v) = grouped(q), (torch.cat((before(x), grouped(x)), 2) for x in (k, v))
    if causal:
        y = torch.cat(
            [
                F.scaled_dot_product_attention(
                    q[:, :, i : i + causal],
                    k[:, :, : t + i + causal],
                    v[:, :, : t + i + causal],
                    mask[:, :, i : i + causal, : t + i + causal],
                )
                for i in range(0, n, causal)
            ],
            2,
        )
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask)
    y = y.unflatten(0, (b, count)).transpose(2, 3).reshape(b, s - t, heads * d)
    return text, y if group is None else y.index_select(1, group[1])


def layer(
    x: Tensor,
    own: tuple,
    more: tuple | None,
    rotary: Tensor,
    text_mask: Tensor,
    spatial: Tensor,
    temporal: Tensor | None,
    group: tuple | None,
    t: int,
    heads: int,
    causal: int,
) -> Tensor:
    """One block; `own` are its weights, `more` those of the temporal channel."""
    norm1, qkv, qk, out, norm2, up, down = own
    h = normed(x, norm1)
    text, y = attend(*project(h, qkv, qk, rotary, heads), t, spatial, text_mask, None, True, 0)
    frames = F.linear(y, *out)
    if more is not None:
        qkv2, qk2, out2, gate = more
        _, y2 = attend(*project(h, qkv2, qk2, rotary, heads), t, temporal, text_mask, group, False, causal)
        frames = torch.lerp(F.linear(y2, *out2), frames, gate.sigmoid())
    x = x + torch.cat((F.linear(text, *out), frames), 1)
    return x + F.linear(F.relu(F.linear(normed(x, norm2), *up)).square(), *down)


class Model:
    """Base, and a temporal channel if there is one, as dictionaries of weights."""

    def __init__(self, config: TransformerConfig, stage: str, device: torch.device, compiled: bool):
        self.config, self.stage, self.device = config, stage, device
        self.window = {"image": 0, "stage1": 0, "stage2": config.window}[stage]
        self.layer = torch.compile(layer, dynamic=False) if compiled else layer

    def hidden(
        self,
        base: dict,
        more: dict | None,
        ids: Tensor,
        inputs: Tensor,
        layout: Layout,
        corners: Tensor | None,
    ) -> Tensor:
        c, t = self.config, layout.text_len
        dtype = base["norm.weight"].dtype
        axes = layout.axes(self.device)
        if corners is not None:
            axes = axes + F.pad(corners, (1, 0))[:, None]
        else:
            axes = axes[None]
        time, row, column = axes.unbind(-1)  # [B or 1, S]
        table = base["positions.weight"][c.first_frame :]
        if more is not None:
            table = torch.cat((table, more["positions.weight"]))
        places = F.embedding((time * c.grid + row) * c.grid + column, table)
        ranks = F.embedding(text_ranks(ids, c.pad), base["positions.weight"])
        x = F.embedding(torch.cat((ids, inputs), 1), base["embed.weight"])
        x = x + torch.cat((ranks, places.expand(len(ids), -1, -1)), 1)

        width = c.width // c.heads
        rotary = rotary_table(F.pad(axes, (0, 0, t, 0)).flatten(0, 1), width)
        rotary = rotary.unflatten(1, (len(axes), -1))[:, :, :, None].to(dtype)  # [2, B or 1, T + S, 1, d]
        bias = torch.zeros(len(ids), 1, 1, t, dtype=dtype, device=self.device)
        bias = bias.masked_fill(ids[:, None, None] == c.pad, float("-inf"))
        text_mask = bias.expand(-1, -1, t, -1).contiguous()

        def mask_of(kind: str, shifted: bool) -> tuple[Tensor, tuple | None]:
            g = groups_of(layout, kind, self.window, shifted, self.device, dtype)
            count, _, n, _ = g.mask.shape
            sees = g.mask.expand(len(ids), count, 1, n, n)
            mask = torch.cat((bias[:, None].expand(-1, count, -1, n, -1), sees), -1).flatten(0, 1)
            return mask, None if g.is_identity else (g.index, g.inverse)

        spatial, _ = mask_of("spatial", False)
        temporal = [(None, None)] * 2
        if more is not None:
            temporal = [
                mask_of("temporal", shifted) for shifted in ((False, True) if self.window else (False,) * 2)
            ]
        causal = layout.frame_tokens if self.stage == "stage1" else 0
        for i in range(c.layers):
            own = self._own(base, i)
            plus = None if more is None else self._more(more, i)
            x = self.layer(x, own, plus, rotary, text_mask, spatial, *temporal[i % 2], t, c.heads, causal)
        return normed(x[:, t:], (base["norm.weight"], base["norm.bias"]))

    def loss(
        self,
        base: dict,
        more: dict | None,
        ids: Tensor,
        codes: Tensor,
        context: Tensor,
        weights: Tensor,
        layout: Layout,
        corners: Tensor | None,
        each: bool = False,
    ) -> Tensor:
        laid, counts = layout.lay(codes).flatten(1), layout.lay(weights).flatten(1)
        inputs = layout.inputs(layout.lay(context), self.config.start)
        hidden = self.hidden(base, more, ids, inputs, layout, corners)
        first = int(layout.loss_mask().argmax())
        right, counts = laid[:, first:], counts[:, first:]
        logits = F.linear(hidden[:, first:], base["embed.weight"][: self.config.codes])
        cost = F.cross_entropy(logits.flatten(0, 1).float(), right.flatten(), reduction="none").view_as(right)
        if each:
            return cost
        return ((cost * counts).sum(1) / counts.sum(1)).mean()

    def _own(self, w: dict, i: int) -> tuple:
        b = f"blocks.{i}."
        pair = lambda name: (w[f"{b}{name}.weight"], w[f"{b}{name}.bias"])  # noqa: E731
        qk = (w[f"{b}attention.norms.0.weight"], w[f"{b}attention.norms.1.weight"])
        return (
            pair("norm1"),
            pair("attention.qkv"),
            qk,
            pair("attention.out"),
            pair("norm2"),
            pair("up"),
            pair("down"),
        )

    def _more(self, w: dict, i: int) -> tuple:
        a = f"attention.{i}."
        pair = lambda name: (w[f"{a}{name}.weight"], w[f"{a}{name}.bias"])  # noqa: E731
        return (pair("qkv"), (w[f"{a}norms.0.weight"], w[f"{a}norms.1.weight"]), pair("out"), w[f"gate.{i}"])


# -- how it learns


class Muon:
    """torch.optim.Muon with match_rms_adamw and a weight decay of 0.01, all matrices of a shape at once."""

    def __init__(self, params: list[Tensor], weight_decay: float = 0.01):
        self.decay = weight_decay
        shapes = sorted({p.shape for p in params})
        self.groups = [[p for p in params if p.shape == shape] for shape in shapes]
        self.momenta = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    @torch.no_grad()
    def step(self, lr: Tensor) -> None:
        for group, momentum in zip(self.groups, self.momenta):
            grads = torch.stack([p.grad for p in group])
            momentum.lerp_(grads, 0.05)
            update = orthogonal(grads.lerp_(momentum, 0.95))
            update = update.to(group[0].dtype) * (lr * (-0.2 * max(group[0].shape) ** 0.5))
            torch._foreach_mul_(group, 1 - lr * self.decay)
            torch._foreach_add_(group, list(update.unbind(0)))


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz in bfloat16 [N, a, b], as torch.optim.Muon does it."""
    x = x.to(HALF)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Learner:
    """Masters in float32, what the model sees in bfloat16, and both optimizers."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state
        self.masters = list(state.values())
        self.seen = {k: v.detach().to(HALF, copy=True).requires_grad_() for k, v in state.items()}
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        tables = ("embed.weight", "positions.weight")
        hidden = [v for k, v in state.items() if v.ndim == 2 and k not in tables]
        rows = [v for k, v in state.items() if k in tables]
        plain = [v for v in self.masters if v.ndim < 2]
        self.muon = Muon(hidden)
        cuda = self.masters[0].is_cuda
        self.adam = torch.optim.AdamW(
            [{"params": rows, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
            lr=torch.tensor(0.0, device=self.masters[0].device),
            betas=(0.9, 0.95),
            fused=cuda,
            capturable=cuda,
        )

    def step(self, lr: Tensor) -> Tensor:
        """Move the masters by the gradients of what is seen; `lr` is a number on the device. Returns the norm
        of the gradient."""
        grads = [master.grad for master in self.masters]
        torch._foreach_copy_(grads, [one.grad for one in self.seen.values()])
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.adam.param_groups:
            group["lr"].copy_(lr)
        self.adam.step()
        self.muon.step(lr)
        with torch.no_grad():
            torch._foreach_copy_([one.detach() for one in self.seen.values()], self.masters)
        for one in self.seen.values():
            one.grad = None
        return norm


class Replay:
    """A trainer's step as one CUDA graph: what a batch holds is copied to where the graph reads it."""

    def __init__(self, trainer: "Trainer", warmup: int = 3):
        self.trainer, device = trainer, trainer.device
        rows, ids, spans = next(trainer.loader)
        self.given = {
            "rows": rows.to(device),
            "ids": ids.to(device),
            "spans": spans.to(device),
            "lr": torch.zeros((), device=device),
        }
        self.chances = trainer.chances()
        self.graph = None
        if device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warmup):  # at a rate of 0: weights stay
                self._draw()
                self.results = trainer.step(self.given, self.chances)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # others pin memory meanwhile
            self.results = trainer.step(self.given, self.chances)

    def _draw(self) -> None:
        for numbers in self.chances.values():
            numbers.uniform_()

    def __call__(self, batch: tuple[Tensor, Tensor, Tensor], lr: float) -> tuple[Tensor, Tensor]:
        for name, value in zip(("rows", "ids", "spans"), batch):
            self.given[name].copy_(value, non_blocking=True)
        self.given["lr"].fill_(lr)
        self._draw()
        if self.graph is None:
            return self.trainer.step(self.given, self.chances)
        self.graph.replay()
        return self.results


class Trainer:
    """One part's training."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        canvas: Canvas,
        device: torch.device,
        workers: int,
        compiled: bool,
        seed: int,
    ):
        model = ModelFolder(folder)
        self.config, self.plan, self.device = model.spec().model, plan, device
        self.stage = "image" if plan.part == "base" else plan.part
        self.layout = self.config.layout(self.stage)
        self.side = self.layout.grid // 2
        self.small = replace(self.layout, grid=self.side)
        self.canvas = canvas
        vqvae = model.load("vqvae").to(device)
        vqvae.encoder.to(HALF if device.type == "cuda" else torch.float32, memory_format=torch.channels_last)
        self.vqvae = vqvae
        vectors = vqvae.codebook.vectors
        self.near = vqvae.codebook._distances(vectors).topk(17, largest=False).indices[:, 1:]
        self.base = {k: v.to(device) for k, v in self._begin(model, "base", seed).items()}
        self.more = None
        if plan.part != "base":
            self.more = {k: v.to(device) for k, v in self._begin(model, plan.part, seed).items()}
        self.learner = Learner(self.base if self.more is None else self.more)
        self.fixed = None if self.more is None else {k: v.to(HALF) for k, v in self.base.items()}
        self.model = Model(self.config, self.stage, device, compiled)
        self._scenes(model, seed, workers)

    def _scenes(self, model: ModelFolder, seed: int, workers: int) -> None:
        text = (model.path / "text.model").read_bytes()
        first, length = model.spec().first_text, self.config.text_len
        world = TinyWorld(sprites(), seed, even=True, varied=True)
        self.scenes = Scenes(world, text, first, self.plan, length, seed)
        held = replace(self.plan, batch=32, drop=0.0)
        self.held = Scenes(
            TinyWorld(sprites(), 777, held_out=True, varied=True), text, first, held, length, 7
        )
        options = {"num_workers": workers, "prefetch_factor": 4} if workers else {}
        self.loader = iter(
            DataLoader(
                self.scenes,
                batch_size=None,
                sampler=range(1_000_000),
                pin_memory=self.device.type == "cuda",
                **options,
            )
        )

    def _begin(self, model: ModelFolder, part: str, seed: int) -> dict[str, Tensor]:
        """A part's weights, as they are there or as they begin."""
        if model.has(part):
            return dict(model.load(part).state_dict())
        torch.manual_seed(seed)
        if part == "base":
            made = Base(self.config)
            made.init_weights(torch.Generator().manual_seed(seed))
            return dict(made.state_dict())
        channel = TemporalChannel(self.config, 0 if part == "stage1" else self.config.window)
        channel.init_weights(torch.Generator().manual_seed(seed))
        if part == "stage2" and model.has("stage1"):
            return dict(model.load("stage1").state_dict())
        base = Base(self.config)
        base.load_state_dict(self.base)
        channel.inherit(base)
        return dict(channel.state_dict())

    def chances(self) -> dict[str, Tensor]:
        """Buffers of uniform numbers, drawn anew for each step."""
        b, n = self.plan.batch, self.layout.frame_tokens
        shape = (b, self.plan.keep, n)
        return {
            "corner": torch.empty(b, 2, device=self.device),
            "wrong": torch.empty(shape, device=self.device),
            "near": torch.empty(shape, device=self.device),
        }

    def prepare(self, rows: Tensor, ids: Tensor, chances: dict[str, Tensor]) -> tuple:
        """What a step needs, from what the frames show: codes, what is read, weights, cover."""
        b, f, _ = rows.shape
        flat = rows.flatten(0, 1)
        frames, cover = self.canvas.both(flat, self.layout.grid)
        codes, cover = encode(self.vqvae, frames).view(b, f, -1), cover.unflatten(0, (b, f))
        weights = 1 + self.plan.object_weight * cover
        context = codes
        if self.plan.corrupt:
            which = (chances["near"] * 16).long().clamp_max(15)
            other = self.near[codes].gather(-1, which[..., None]).squeeze(-1)
            context = torch.where(chances["wrong"] < self.plan.corrupt, other, codes)
        return ids, codes, context, weights, cover, chances["corner"]

    def loss(self, prepared: tuple) -> Tensor:
        ids, codes, context, weights, cover, uniform = prepared
        base = self.learner.seen if self.more is None else self.fixed
        more = None if self.more is None else self.learner.seen
        grid = self.layout.grid
        cut = int(len(ids) * self.plan.crop_share)
        whole = [x[cut:].flatten(2) for x in (codes, context, weights)]
        total = self.model.loss(base, more, ids[cut:], *whole, self.layout, None) * (1 - self.plan.crop_share)
        if cut:
            corners = corners_of(cover[:cut], self.side, self.model.window or 1, uniform[:cut])
            maps = (
                x[:cut].unflatten(2, (grid, grid)) if x.ndim == 3 else x[:cut]
                for x in (codes, context, weights)
            )
            small = [window(x, corners, self.side) for x in maps]
            part = self.model.loss(base, more, ids[:cut], *small, self.small, corners)
            total = total + part * self.plan.crop_share
        return total

    @torch.no_grad()
    def held_out(self, batches: int = 8) -> dict[str, float]:
        """Nats a code of held-out clips: all, on the object, at its edge, background."""
        costs, covers = [], []
        base = self.learner.seen if self.more is None else self.fixed
        more = None if self.more is None else self.learner.seen
        plain, self.model.layer = self.model.layer, layer
        for k in range(batches):
            rows, ids, _ = self.held[k]
            b, f, _ = rows.shape
            codes = encode(self.vqvae, self.canvas.draw(rows.flatten(0, 1))).view(b, f, -1)
            cover = self.canvas.cover(rows.flatten(0, 1), self.layout.grid).view(b, f, -1)
            cost = self.model.loss(
                base, more, ids.to(self.device), codes, codes, cover, self.layout, None, True
            )
            first = int(self.layout.loss_mask().argmax())
            costs.append(cost.flatten())
            covers.append(self.layout.lay(cover).flatten(1)[:, first:].flatten())
        self.model.layer = plain
        cost, cover = torch.cat(costs), torch.cat(covers)
        kinds = {
            "all": cover >= 0,
            "object": cover > 0.95,
            "edge": (cover > 0) & (cover <= 0.95),
            "background": cover == 0,
        }
        return {name: round(float(cost[chosen].mean()), 4) for name, chosen in kinds.items()}

    def step(self, given: dict[str, Tensor], chances: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One step, in operations that are always the same: loss and norm of the gradient. given: `rows`,
        `ids`, `spans` of a batch and `lr`."""
        loss = self.loss(self.prepare(given["rows"], given["ids"], chances))
        loss.backward()
        return loss.detach(), self.learner.step(given["lr"])

    def train(self, seconds: float, out: Path, say: Callable[[str], None]) -> None:
        """Train for some seconds. The weights are written to `out` every minute, since a lent machine may be
        gone before the time is up."""
        run = Replay(self)
        say(f"{self.plan.part}: ready")
        begin = told = saved = time.perf_counter()
        step, seen = 0, 0
        while (now := time.perf_counter()) - begin < seconds:
            share = (now - begin) / seconds
            lr = self.plan.lr * min(1, (step + 1) / self.plan.warmup) * min(1, (1 - share) / self.plan.decay)
            loss, norm = run(next(self.loader), lr)
            step += 1
            if now - saved > 60:
                self.save(out)
                divide(out)
                saved = now
            if step == 5 or now - told > 10:
                value = loss.item()
                speed = (step - seen) * self.plan.batch / (time.perf_counter() - told)
                say(
                    f"{self.plan.part} step {step} {now - begin:.0f} s loss {value:.3f} "
                    f"norm {float(norm):.2f} lr {lr:.1e} {speed:.0f} clips/s"
                )
                told, seen = time.perf_counter(), step
                if value != value:
                    raise ArithmeticError(f"{self.plan.part} step {step}: the loss is not a number")
            elif step % 2 == 0 and self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # the clock must not run ahead of the device
        say(f"{self.plan.part}: {step} steps, {step * self.plan.batch} clips")

    def save(self, out: Path) -> None:
        state = {k: v.detach().half().cpu().contiguous() for k, v in self.learner.state.items()}
        save_file(state, out / f"{self.plan.part}.safetensors")


class DecoderTrainer(Trainer):
    """The last phase: codes of which some are the stages' own, to frames."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        canvas: Canvas,
        device: torch.device,
        workers: int,
        seed: int,
        features: str,
    ):
        model = ModelFolder(folder)
        self.config, self.plan, self.device, self.canvas = model.spec().model, plan, device, canvas
        self.layout = self.config.layout("stage1")
        self.parts = {
            name: model.load(name).to(device) for name in ("vqvae", "base", "stage1", "stage2", "decoder")
        }
        for name in ("vqvae", "base", "stage1", "stage2"):
            self.parts[name].requires_grad_(False)
        self.vqvae, self.decoder = (
            self.parts["vqvae"],
            self.parts["decoder"].to(memory_format=torch.channels_last),
        )
        self.decoder.requires_grad_(True)
        fixed = {
            name: {k: v.to(HALF) for k, v in self.parts[name].state_dict().items()}
            for name in ("base", "stage1", "stage2")
        }
        self.stages = [
            (self.config.layout(one), Model(self.config, one, device, False), fixed["base"], fixed[one])
            for one in ("stage1", "stage2")
        ]
        loss = LossWeights(perceptual=0.2, temporal=0.02, weights=features)
        self.hierarchical = HierarchicalLoss(loss).to(device, memory_format=torch.channels_last)
        cuda = device.type == "cuda"
        self.adam = torch.optim.AdamW(
            self.decoder.parameters(),
            lr=torch.tensor(0.0, device=device),
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=cuda,
            capturable=cuda,
        )
        self.critic = new_discriminator(seed).to(device)
        self.critic_adam = torch.optim.AdamW(
            self.critic.parameters(),
            lr=torch.tensor(2e-4, device=device),
            betas=(0.5, 0.95),
            weight_decay=0.0,
            fused=cuda,
            capturable=cuda,
        )
        self._scenes(model, seed, workers)

    def chances(self) -> dict[str, Tensor]:
        shape = (self.plan.batch, self.plan.keep, self.layout.frame_tokens)
        found = {name: torch.empty(shape, device=self.device) for name in ("wrong", "which")}
        found["share"] = torch.empty(self.plan.batch, 1, 1, device=self.device)
        if self.plan.adversary:
            r = self.canvas.size
            found["noise"] = torch.empty(self.plan.batch, self.plan.keep, 3, r, r, device=self.device)
        return found

    def resample(self, codes: Tensor, ids: Tensor, spans: Tensor, chances: dict[str, Tensor]) -> Tensor:
        """`inputs.Resampler`, both stages on all clips."""
        found = []
        for layout, model, base, more in self.stages:
            laid = layout.lay(codes)
            hidden = model.hidden(base, more, ids, layout.inputs(laid, self.config.start), layout, None)
            logits = F.linear(hidden, base["embed.weight"][: self.config.codes])
            shares = logits.float().softmax(-1).cumsum(-1)
            sampled = torch.searchsorted(shares, layout.lay(chances["which"]).flatten(1)[..., None]).squeeze(
                -1
            )
            found.append(layout.unlay(sampled.clamp_max(shares.shape[-1] - 1).view_as(laid)))
        sampled = torch.where((spans >= SECONDS)[:, None, None], *found)
        return torch.where(chances["wrong"] < MOST_WRONG * chances["share"], sampled, codes)

    def step(self, given: dict[str, Tensor], chances: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        b, f, _ = given["rows"].shape
        flat = given["rows"].flatten(0, 1)
        clips, cover = self.canvas.both(flat, 48)
        counts = 1 + self.plan.object_weight * cover.unflatten(0, (b, f))
        counts = (counts / counts.mean((1, 2, 3), keepdim=True)).flatten(0, 1)
        w = self.hierarchical.weights
        with torch.autocast(self.device.type, HALF, cache_enabled=False):
            with torch.no_grad():
                codes = encode(self.vqvae, clips).view(b, f, -1)
                codes = self.resample(codes, given["ids"], given["spans"], chances)
                z = self.vqvae.vectors(codes.flatten(0, 1)).unflatten(0, (b, f))
            made = self.decoder(z, given["ids"])
            flat = made.flatten(0, 1)
            loss = weighted((flat - clips).abs().mean(1), counts).mean()
            loss = (
                loss + w.perceptual * perceptual_distance(self.hierarchical.net, flat, clips, counts).mean()
            )
            clips = clips.unflatten(0, (b, f))
            loss = loss + w.temporal * temporal_distance(made, clips).mean()
            if self.plan.adversary:
                loss = loss + self.adversarial_losses(made, clips, counts, chances["noise"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.adam.param_groups[0]["lr"].copy_(given["lr"])
        self.adam.step()
        self.adam.zero_grad()
        if self.plan.adversary:
            self.critic_adam.step()
            self.critic_adam.zero_grad()
        return loss.detach(), norm

    def adversarial_losses(self, made: Tensor, right: Tensor, counts: Tensor, uniform: Tensor) -> Tensor:
        """`discriminator.adversarial_losses`, with the noise given as uniform numbers of the same
        variance."""

        def mean(values: Tensor) -> Tensor:
            return weighted(values.flatten(0, 1), counts).mean()

        self.critic.requires_grad_(False)
        loss = self.plan.adversary * mean(F.softplus(-self.critic(made)))
        self.critic.requires_grad_(True)
        noise = (uniform - 0.5) * 12**0.5
        true, shaken, false = self.critic(torch.cat((right, right + NOISE * noise, made.detach()))).chunk(3)
        slope = SLOPE * (true - shaken).square().mean()
        return loss + mean(F.softplus(-true)) + mean(F.softplus(false)) + slope

    @torch.no_grad()
    def held_out(self, batches: int = 4) -> dict[str, float]:
        """Terms of the loss on held-out clips, from true codes."""
        sums: dict[str, list[float]] = {}
        for k in range(batches):
            rows, ids, _ = self.held[k]
            b, f, _ = rows.shape
            clips = self.canvas.draw(rows.flatten(0, 1))
            weights = 1 + self.plan.object_weight * self.canvas.cover(rows.flatten(0, 1), 48).unflatten(
                0, (b, f)
            )
            with torch.autocast(self.device.type, HALF):
                z = self.vqvae.vectors(encode(self.vqvae, clips)).unflatten(0, (b, f))
                made = self.decoder(z, ids.to(self.device))
                _, numbers = self.hierarchical(made, clips.unflatten(0, (b, f)), weights)
            for name, value in numbers.items():
                sums.setdefault(name, []).append(value)
        return {name: round(sum(values) / len(values), 4) for name, values in sums.items()}

    def save(self, out: Path) -> None:
        name = "adversary" if self.plan.adversary else "decoder"
        state = {k: v.detach().half().cpu().contiguous() for k, v in self.decoder.state_dict().items()}
        save_file(state, out / f"{name}.safetensors")


def divide(out: Path, limit: int = 15 * 2**20) -> None:
    """Cut what is too large to be fetched."""
    for file in sorted(out.glob("*.safetensors")):
        if file.stat().st_size > limit:
            state, part, size, number = load_file(file), {}, 0, 0
            for name, value in state.items():
                if size + value.nbytes > limit:
                    save_file(part, out / f"{file.stem}.{number}.safetensors")
                    part, size, number = {}, 0, number + 1
                part[name] = value
                size += value.nbytes
            save_file(part, out / f"{file.stem}.{number}.safetensors")
            file.unlink()


def bench(trainer: Trainer, say) -> None:
    """Milliseconds of a step, as operations and as a graph, and the kernels that take longest."""

    def clock(work, times: int) -> float:
        work()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times * 1000

    begin = time.perf_counter()
    run = Replay(trainer)
    ready = time.perf_counter() - begin
    batch = next(trainer.loader)
    replayed = clock(lambda: run(batch, 1e-5), 10)
    plain = clock(lambda: trainer.step(run.given, run.chances), 4)
    data = clock(lambda: next(trainer.loader), 40)
    memory = torch.cuda.max_memory_allocated() / 1e9
    say(
        f"bench {trainer.plan.part} batch {trainer.plan.batch}: ready in {ready:.1f} s; "
        f"graph {replayed:.1f} ms, operations {plain:.1f} ms, data {data:.1f} ms; {memory:.1f} GB"
    )
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run(batch, 1e-5)
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)
    total = sum(row.device_time_total for row in rows)
    say(f"kernels {total / 1000:.1f} ms")
    for row in rows[:28]:
        say(f"  {row.device_time_total / 1000:7.2f} ms {row.count:5d} x {row.key[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("work", nargs="+", help="part:seconds, part:bench, or part:ready to compile alone")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=max(0, min(12, (os.cpu_count() or 1) - 3)))
    parser.add_argument("--total", type=float, default=float("inf"), help="seconds that all may take")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--features", default="", help="weights of the feature network, if not its own")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.0)
    options = parser.parse_args()
    device, begin = torch.device(options.device), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        line = f"[{time.perf_counter() - begin:6.1f}] {line}"
        print(line, flush=True)
        with (options.out / "log.txt").open("a") as file:
            file.write(line + "\n")

    torch.set_num_threads(2)
    torch._dynamo.config.recompile_limit = 64
    resolution = ModelFolder(options.model).spec().resolution
    canvas = Canvas(resolution, device, processes=min(16, os.cpu_count() or 1))
    say(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}, torch {torch.__version__}, "
        f"{os.cpu_count()} cores; places drawn"
    )
    failed = []
    for number, work in enumerate(options.work):
        try:
            perform(work, options.seed + number, options, canvas, begin, say)
        except Exception:  # what comes after may still be worth its time
            failed.append(work)
            say(f"{work} failed: {traceback.format_exc()}")
        gc.collect()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def perform(
    work: str,
    seed: int,
    options: argparse.Namespace,
    canvas: Canvas,
    begin: float,
    say: Callable[[str], None],
) -> None:
    """Do one piece of work, "part:seconds", "part:bench" or "part:ready"; `begin`: when the program began."""
    part, _, seconds = work.partition(":")
    device = torch.device(options.device)
    plan = PLANS[part]
    plan = replace(plan, batch=options.batch or plan.batch, lr=options.lr or plan.lr)
    if plan.part == "decoder":
        trainer: Trainer = DecoderTrainer(
            options.model, plan, canvas, device, options.workers, seed, options.features
        )
    else:
        trainer = Trainer(options.model, plan, canvas, device, options.workers, not options.eager, seed)
    if seconds == "bench":
        bench(trainer, say)
    elif seconds == "ready":
        Replay(trainer)
        say(f"{part}: compiled")
    else:
        left = options.total - (time.perf_counter() - begin) - 12  # of which some are for reading it in
        trainer.train(min(float(seconds), left), options.out, say)
        trainer.save(options.model)
        trainer.save(options.out)
        divide(options.out)
        say(f"{part} saved")
        say(f"{part}: held out {json.dumps(trainer.held_out())}")


if __name__ == "__main__":
    main()

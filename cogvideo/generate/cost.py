"""What generation costs, as arithmetic over the sizes of a model: steps, bytes to read, memory.

A step is bound by memory: it reads all weights once, however many rows go through them, and the keys and
values of every row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cogvideo.generate.int8 import packs
from cogvideo.generate.sampling import Sampling
from cogvideo.layout import Layout, rounds
from cogvideo.model.families import CogVideoSpec, RegressionSpec, Spec
from cogvideo.model.transformer import Base, TransformerConfig
from cogvideo.model.vqvae import VQVAE

BYTES = {"int8": 1, "bfloat16": 2, "float32": 4}
CHANNELS = ("stage1", "stage2", "superres")  # of which one at a time must be in memory


@dataclass(frozen=True)
class Cost:
    """What one task costs: `steps` times `rows` tokens through all layers, and convolutions once."""

    name: str
    steps: int = 0
    rows: float = 0.0  # tokens a step, on average
    layers: int = 0
    weights: int = 0  # of matrices
    seen: float = 0.0  # numbers of keys and values that a step reads
    before: int = 0  # tokens that go through all layers before the first step
    flops: float = 0.0  # of convolutions

    @property
    def tokens(self) -> int:
        return round(self.steps * self.rows)

    def read(self, dtype: str) -> float:
        """Bytes that a step reads."""
        return self.weights * BYTES[dtype] + self.seen * (2 if dtype == "bfloat16" else 4)


@singledispatch
def plan(spec: Spec, sampling: dict[str, Sampling], videos: int = 1) -> list[Cost]:
    """The tasks of generating `videos` of the full length."""
    raise NotImplementedError(type(spec).__name__)


@plan.register
def _(spec: RegressionSpec, sampling: dict[str, Sampling], videos: int = 1) -> list[Cost]:
    c = spec.regression
    tokens = c.frames * c.grid**2
    attention = 4 * c.layers * tokens * (tokens + c.text_len) * c.width  # which grows with the square
    refinement = 2 * tokens * c.patch**2 * 9 * c.refine_width * (2 * c.refine_blocks * c.refine_width + 12)
    weights = 16 * c.layers * c.width**2 + 3 * c.patch**2 * c.width
    text = Cost("text", videos, c.text_len, c.layers, 12 * c.layers * c.width**2)
    frames = Cost("frames", videos, tokens, c.layers, weights, flops=videos * (attention + refinement))
    return [text, frames, *_upscale(spec, videos)]


@plan.register
def _(spec: CogVideoSpec, sampling: dict[str, Sampling], videos: int = 1) -> list[Cost]:
    c = spec.model
    between = c.layout("stage2")
    rows = {name: videos * (1 + one.guided) for name, one in sampling.items()}
    costs = [
        _fill("first frame", c, c.layout("image"), 0, None, rows["image"]),
        _fill("key frames", c, c.layout("stage1"), 1, 0, rows["stage1"]),
    ]
    counts = rounds(c.frames)
    for before, fps in zip(counts, [*counts.values()][1:]):
        windows = (before - 1) // (len(between.given) - 1) * rows["stage2"]
        costs.append(_fill(f"to {fps:g} fps", c, between, len(between.given), c.window, windows))
    frames = spec.clip_frames
    grid = c.grid
    if spec.superres:
        s = spec.superres
        grid = s.side
        tokens = s.text_len + s.grid**2 + s.side**2
        costs.append(Cost("larger frames", videos * frames, tokens, c.layers, matrices(c, False)))
    flops = _decoder_flops(spec, frames) if spec.decoder else frames * _decode_flops(spec, grid)
    costs.append(Cost("decode", flops=videos * flops))
    return [*costs, *_upscale(spec, videos)]


def _upscale(spec: Spec, videos: int) -> list[Cost]:
    if not spec.refiner:
        return []
    return [Cost("upscale", flops=videos * _upscale_flops(spec, spec.clip_frames))]


def _fill(name: str, c: TransformerConfig, layout: Layout, known: int, window: int | None, rows: int) -> Cost:
    """Filling in the frames of a layout after the known ones, by a model with a temporal channel or none."""
    steps = list(layout.waves(known, window or 0))
    kinds = ("spatial",) if window is None else ("spatial", "temporal")
    seen = 0.0
    for kind in kinds:
        for shifted in (False, True):
            segments = layout.segments(kind, window or 0, shifted)
            reads = {(segments.start[p], segments.end[p], n) for n, step in enumerate(steps) for p in step}
            seen += sum(end - start for start, end, _ in reads) * c.layers / 2 * 2 * c.width
    tokens = sum(len(step) for step in steps)
    before = rows * (layout.text_len + known * layout.frame_tokens)
    return Cost(
        name,
        len(steps),
        rows * tokens / len(steps),
        c.layers,
        matrices(c, window is not None),
        rows * seen / len(steps),
        before,
    )


def matrices(c: TransformerConfig, temporal: bool) -> int:
    """Weights that a step reads."""
    return c.layers * (16 if temporal else 12) * c.width**2 + c.codes * c.width


def _decode_flops(spec: CogVideoSpec, grid: int) -> float:
    vqvae = spec.outline("vqvae")
    assert isinstance(vqvae, VQVAE)
    codes = torch.zeros(1, grid * grid, dtype=torch.long, device="meta")
    return _flops(lambda: vqvae.decode(codes))


def _decoder_flops(spec: CogVideoSpec, frames: int) -> float:
    decoder, c = spec.outline("decoder"), spec.model
    z = torch.zeros(1, frames, spec.vqvae.code_width, c.grid, c.grid, device="meta")
    text = torch.zeros(1, c.text_len, dtype=torch.long, device="meta")
    return _flops(lambda: decoder(z, text))


def _upscale_flops(spec: Spec, frames: int) -> float:
    size = spec.resolution
    refiner = spec.outline("refiner")
    return _flops(lambda: refiner(torch.zeros(1, frames, 3, size, size, device="meta")))


def _flops(action: Callable[[], Tensor]) -> float:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        action()
    return float(counter.get_total_flops())


def memory(spec: Spec, dtype: str, rows: int, cpu: bool = True) -> dict[str, float]:
    """Bytes of each loaded part, and of the cache of keys and values for `rows` rows of key frames (or for
    one row of interpolation, if that is more)."""
    held: dict[str, float] = {}
    for name in spec.generation_parts:
        part = spec.outline(name)
        linear = sum(m.weight.numel() for m in part.modules() if isinstance(m, nn.Linear))
        rest = sum(p.numel() for p in part.state_dict().values()) - linear
        kind = "float32" if name in spec.pixel_parts else dtype
        packed = cpu and packs(kind)
        if isinstance(part, Base) and packed:  # the head is a copy; the embedding is mapped, not read
            c = part.config
            linear += c.codes * c.width
            rest -= c.vocab * c.width if kind != "bfloat16" else 0
        held[name] = linear * BYTES[kind] + rest * (2 if kind == "bfloat16" else 4)
    return held | _caches(spec, dtype, rows)


@singledispatch
def _caches(spec: Spec, dtype: str, rows: int) -> dict[str, float]:
    return {}


@_caches.register
def _(spec: CogVideoSpec, dtype: str, rows: int) -> dict[str, float]:
    c = spec.model
    keyframes = cache_bytes(c, c.layout("stage1"), 0, dtype)
    between = cache_bytes(c, c.layout("stage2"), c.window, dtype)
    return {"caches": max(keyframes * rows, between)}  # interpolation fills as many rows at a time as fit


def cache_bytes(c: TransformerConfig, layout: Layout, window: int, dtype: str) -> float:
    """Bytes of the keys and values of one row, in both channels of all layers."""
    slots = sum(
        max(layout.segments(kind, window, shifted).slot) + 1
        for kind in ("spatial", "temporal")
        for shifted in (False, True)
    )
    return slots * c.layers * c.width * (2 if dtype == "bfloat16" else 4)

"""What generation costs, before anything heavy is loaded: memory, bytes to read, steps, and time here.

`plan` is arithmetic over a System: every verb as `Work`. `Speed.measure` takes two seconds on this machine;
`Work.seconds` puts the two together. A step is bound by memory: it reads all weights once, however many rows
go through them, and the keys and values of every row.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cogvideo import hardware
from cogvideo.layout import Layout, rounds
from cogvideo.model.packed import Int8Linear, PackedLinear
from cogvideo.model.system import DirectSystem, System
from cogvideo.model.transformer import Base, DualChannelTransformer, ModelConfig
from cogvideo.sampling import Sampling

BYTES = {"int8": 1, "bfloat16": 2, "float32": 4}
CHANNELS = ("stage1", "stage2", "superres")  # of which one at a time must be in memory
ROWS = (1, 4, 16, 64, 512)  # at which layers are measured


@dataclass(frozen=True)
class Work:
    """What one verb does: `steps` times, `rows` tokens go through all layers; and convolutions, once."""

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

    def seconds(self, speed: "Speed") -> float:
        caches = self.seen * (2 if speed.dtype == "bfloat16" else 4) / speed.bandwidth
        step = self.weights * speed.a_weight(self.rows) + self.layers * speed.a_layer + caches
        return self.steps * step + self.weights * speed.a_weight(self.before) + self.flops / speed.flops


@dataclass(frozen=True)
class Speed:
    """Of this machine, for one dtype, in seconds and per second."""

    dtype: str
    weights: tuple[float, ...]  # seconds a weight takes, at each of ROWS
    a_layer: float  # seconds a layer takes without its matrices
    bandwidth: float  # bytes read from memory
    flops: float  # of convolutions

    def a_weight(self, rows: float) -> float:
        """Seconds a weight takes when `rows` go through it; between the measured ones by proportion."""
        if rows == 0:
            return 0.0
        if rows >= ROWS[-1]:
            return self.weights[-1] * rows / ROWS[-1]
        above = next(i for i, known in enumerate(ROWS) if known >= rows)
        if above == 0:
            return self.weights[0]
        share = (rows - ROWS[above - 1]) / (ROWS[above] - ROWS[above - 1])
        return self.weights[above - 1] * (1 - share) + self.weights[above] * share

    @classmethod
    def measure(cls, dtype: str) -> "Speed":
        """Two seconds of the same operations that generation is made of."""
        wide = nn.Linear(2048, 8192).requires_grad_(False)
        copies = [_as(wide, dtype) for _ in range(8)]  # more than the caches hold
        weights = []
        for rows in ROWS:
            x = torch.randn(rows, 2048, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
            taken = _fastest(partial(_through, copies, x))
            weights.append(taken / (8 * wide.weight.numel()))
        picture, kernel = torch.randn(1, 128, 96, 96), torch.randn(128, 128, 3, 3)
        conv = _fastest(lambda: nn.functional.conv2d(picture, kernel, padding=1))
        return cls(dtype, tuple(weights), _a_layer(), bandwidth(), 2 * picture.numel() * 128 * 9 / conv)


def bandwidth() -> float:
    """Bytes that are read from memory in a second, by a sum."""
    block = torch.ones(2**26)
    return block.numel() * 4 / _fastest(block.sum)


def _through(layers: list[nn.Module], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def _as(linear: nn.Linear, dtype: str) -> nn.Module:
    if dtype == "int8":
        return Int8Linear(linear.weight, linear.bias)
    return PackedLinear(linear.weight, linear.bias, getattr(torch, dtype))


def _fastest(action: Callable[[], Any], seconds: float = 0.15) -> float:
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds or best == float("inf"):
        one = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - one)
    return best


def _a_layer() -> float:
    """Seconds of a layer whose matrices are next to nothing."""
    config = ModelConfig(2, 16, 2, 40, 8, 9, 10, text_len=2, grid=2)
    model, layout = DualChannelTransformer(Base(config)).eval(), Layout.image(2, 2)
    with torch.inference_mode():
        cache = model.new_cache(layout, 1)
        model.body(torch.full((1, 2), 20), layout, cache)
        token = torch.zeros(1, 1, dtype=torch.long)
        return _fastest(lambda: model(token, layout, cache, [0])) / config.layers


# -- arithmetic


def plan(system: Any, sampling: dict[str, Sampling], videos: int = 1) -> list[Work]:
    """Every verb of making `videos` of the full length, with a System or a DirectSystem."""
    work = _regression(system, videos) if system.family == "direct" else _stages(system, sampling, videos)
    if system.refiner:
        frames = system.direct.frames if system.family == "direct" else max(rounds(system.model.frames))
        work.append(Work("upscale", flops=videos * _upscale_flops(system, frames)))
    return work


def _regression(system: DirectSystem, videos: int) -> list[Work]:
    c = system.direct
    places = c.frames * c.grid**2
    attention = 4 * c.layers * places * (places + c.text_len) * c.width  # which grows with the square
    refinement = 2 * places * c.patch**2 * 9 * c.refine_width * (2 * c.refine_blocks * c.refine_width + 12)
    return [Work("text", videos, c.text_len, c.layers, 12 * c.layers * c.width**2),
            Work("frames", videos, places, c.layers, 16 * c.layers * c.width**2 + 3 * c.patch**2 * c.width,
                 flops=videos * (attention + refinement))]


def _stages(system: System, sampling: dict[str, Sampling], videos: int) -> list[Work]:
    c = system.model
    image, keyframes, between = (c.layout(stage) for stage in ("image", "stage1", "stage2"))
    rows = {name: videos * (1 + one.guided) for name, one in sampling.items()}
    work = [_fill("first frame", c, image, 0, None, rows["image"]),
            _fill("key frames", c, keyframes, 1, 0, rows["stage1"])]
    counts = rounds(c.frames)
    for before, fps in zip(counts, [*counts.values()][1:]):
        windows = (before - 1) // (len(between.given) - 1) * rows["stage2"]
        work.append(_fill(f"to {fps:g} fps", c, between, len(between.given), c.window, windows))
    frames = max(counts)
    if system.superres:
        s = system.superres
        tokens = s.text_len + s.grid**2 + s.side**2
        work.append(Work("larger frames", videos * frames, tokens, c.layers, matrices(c, False)))
    grid = system.superres.side if system.superres else c.grid
    flops = _decoder_flops(system, frames) if system.decoder else frames * _decode_flops(system, grid)
    work.append(Work("decode", flops=videos * flops))
    return work


def _fill(name: str, c: ModelConfig, layout: Layout, known: int, window: int | None, rows: int) -> Work:
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
    before = rows * (layout.text_len + known * layout.frame_len)
    return Work(name, len(steps), rows * tokens / len(steps), c.layers, matrices(c, window is not None),
                rows * seen / len(steps), before)


def matrices(c: ModelConfig, temporal: bool) -> int:
    """Weights that a step reads."""
    return c.layers * (16 if temporal else 12) * c.width**2 + c.codes * c.width


def _decode_flops(system: System, grid: int) -> float:
    vqvae, codes = system.outline("vqvae"), torch.zeros(1, grid * grid, dtype=torch.long, device="meta")
    return _flops(lambda: vqvae.decode(codes))


def _decoder_flops(system: System, frames: int) -> float:
    decoder, c = system.outline("decoder"), system.model
    z = torch.zeros(1, frames, system.vqvae.code_width, c.grid, c.grid, device="meta")
    text = torch.zeros(1, c.text_len, dtype=torch.long, device="meta")
    return _flops(lambda: decoder(z, text))


def _upscale_flops(system: Any, frames: int) -> float:
    size, refiner = system.resolution, system.outline("refiner")
    return _flops(lambda: refiner(torch.zeros(1, frames, 3, size, size, device="meta")))


def _flops(action: Callable[[], Tensor]) -> float:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        action()
    return float(counter.get_total_flops())


# -- memory


def memory(system: Any, dtype: str, rows: int, cpu: bool = True) -> dict[str, float]:
    """Bytes of every part when it is loaded, and of keys and values: of `rows` key frames, or of a window."""
    held: dict[str, float] = {}
    for name in system.parts:
        if name.startswith("itersr"):  # which generation does without
            continue
        part = system.outline(name)
        linear = sum(m.weight.numel() for m in part.modules() if isinstance(m, nn.Linear))
        rest = sum(p.numel() for p in part.state_dict().values()) - linear
        kind = dtype if name not in ("vqvae", "decoder", "refiner") else "float32"
        if name.endswith("base") and cpu:  # the head is a copy; the embedding is mapped, not read
            linear += system.model.codes * system.model.width
            rest -= system.model.vocab * system.model.width if kind != "bfloat16" else 0
        held[name] = linear * BYTES[kind] + rest * (2 if kind == "bfloat16" else 4)
    if system.family == "direct":
        return held
    c = system.model
    keyframes = cache_bytes(c, c.layout("stage1"), 0, dtype)
    between = cache_bytes(c, c.layout("stage2"), c.window, dtype)
    held["caches"] = max(keyframes * rows, between)  # windows are filled as many at a time as there is room
    return held


def cache_bytes(c: ModelConfig, layout: Layout, window: int, dtype: str) -> float:
    """Of the keys and values of one row, in both channels of all layers."""
    slots = sum(max(layout.segments(kind, window, shifted).slot) + 1
                for kind in ("spatial", "temporal") for shifted in (False, True))
    return slots * c.layers * c.width * (2 if dtype == "bfloat16" else 4)


@dataclass(frozen=True)
class Estimate:
    """All of it for one model, and as a table."""

    system: Any  # System or DirectSystem
    sampling: dict[str, Sampling]
    dtype: str
    videos: int = 1
    device: torch.device | str = "cpu"

    @cached_property
    def work(self) -> list[Work]:
        return plan(self.system, self.sampling, self.videos)

    @cached_property
    def held(self) -> dict[str, float]:
        """Bytes of every part, and of the caches of the one video at a time that must fit."""
        on_cpu = torch.device(self.device).type == "cpu"
        return memory(self.system, self.dtype, 1 + self.sampling["stage1"].guided, on_cpu)

    @cached_property
    def free(self) -> float | None:
        return hardware.free_memory(self.device)

    @property
    def least(self) -> float:
        """Bytes if of the channels only that is there which is computed with."""
        channels = [self.held.get(name, 0) + self.held.get(f"{name}_base", 0) for name in CHANNELS]
        return sum(self.held.values()) - sum(channels) + max(channels)

    @property
    def fits(self) -> bool:
        return self.free is None or self.least < self.free

    def table(self, speed: Speed | None = None) -> str:
        """Memory, and what every verb does; with a measured speed also the time that it should take."""
        lines = [f"{'memory':<16}{'GB':>8}"]
        lines += [f"{name:<16}{size / 1e9:>8.2f}" for name, size in self.held.items()]
        have = "" if self.free is None else f"  of {self.free / 1e9:.1f} that are free"
        lines.append(f"{'all':<16}{sum(self.held.values()) / 1e9:>8.2f}{have}")
        if self.least < sum(self.held.values()):
            lines.append(f"{'at least':<16}{self.least / 1e9:>8.2f}  with one channel at a time")
        lines.append("")
        lines.append(f"{'verb':<16}{'steps':>8}{'tokens':>10}{'MB/step':>10}{'seconds' if speed else '':>10}")
        for one in self.work:
            seconds = f"{one.seconds(speed):.1f}" if speed else ""
            counts = f"{one.steps:>8}{one.tokens:>10}{one.read(self.dtype) / 1e6:>10.1f}"
            lines.append(f"{one.name:<16}{counts if one.steps else '':<28}{seconds:>10}")
        if speed:
            lines.append(f"{'all':<44}{sum(one.seconds(speed) for one in self.work):>10.1f}")
        return "\n".join(lines)

"""What generation costs on this machine, before anything heavy is loaded.

`Speed.measure` takes two seconds; `Estimate` puts it and the arithmetic of `cost` together.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo import hardware
from cogvideo.generate.cost import CHANNELS, Work, memory, plan
from cogvideo.generate.int8 import Int8Linear, PackedLinear
from cogvideo.generate.sampling import Sampling
from cogvideo.layout import Layout
from cogvideo.model.families import Spec
from cogvideo.model.transformer import Base, DualChannelTransformer, ModelConfig

ROWS = (1, 4, 16, 64, 512)  # at which layers are measured


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

    def seconds(self, work: Work) -> float:
        """Seconds that a verb should take."""
        caches = work.seen * (2 if self.dtype == "bfloat16" else 4) / self.bandwidth
        step = work.weights * self.a_weight(work.rows) + work.layers * self.a_layer + caches
        return work.steps * step + work.weights * self.a_weight(work.before) + work.flops / self.flops

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
        image = torch.randn(1, 128, 96, 96)
        kernel = torch.randn(128, 128, 3, 3)
        conv = _fastest(lambda: nn.functional.conv2d(image, kernel, padding=1))
        return cls(dtype, tuple(weights), _a_layer(), bandwidth(), 2 * image.numel() * 128 * 9 / conv)


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
        model.prefill(torch.full((1, 2), 20), layout, cache)
        token = torch.zeros(1, 1, dtype=torch.long)
        return _fastest(lambda: model.step(token, cache, [0])) / config.layers


@dataclass(frozen=True)
class Estimate:
    """All of it for one model, and as a table."""

    spec: Spec
    sampling: dict[str, Sampling]
    dtype: str
    videos: int = 1
    device: torch.device | str = "cpu"

    @cached_property
    def work(self) -> list[Work]:
        return plan(self.spec, self.sampling, self.videos)

    @cached_property
    def held(self) -> dict[str, float]:
        """Bytes of every part, and of the caches of the one video at a time that must fit."""
        on_cpu = torch.device(self.device).type == "cpu"
        return memory(self.spec, self.dtype, 1 + self.sampling["stage1"].guided, on_cpu)

    @cached_property
    def free(self) -> float | None:
        return hardware.free_memory(self.device)

    @property
    def least(self) -> float:
        """Minimum bytes: only the channel in use is loaded."""
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
            seconds = f"{speed.seconds(one):.1f}" if speed else ""
            counts = f"{one.steps:>8}{one.tokens:>10}{one.read(self.dtype) / 1e6:>10.1f}"
            lines.append(f"{one.name:<16}{counts if one.steps else '':<28}{seconds:>10}")
        if speed:
            lines.append(f"{'all':<44}{sum(speed.seconds(one) for one in self.work):>10.1f}")
        return "\n".join(lines)

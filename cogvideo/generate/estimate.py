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
from cogvideo.generate.cost import CHANNELS, Cost, memory, plan
from cogvideo.generate.int8 import Int8Linear, PackedLinear
from cogvideo.generate.sampling import Sampling
from cogvideo.layout import Layout
from cogvideo.model.families import Spec
from cogvideo.model.transformer import Base, DualChannelTransformer, TransformerConfig

MEASURED_ROWS = (1, 4, 16, 64, 512)  # at which layers are measured


@dataclass(frozen=True)
class Speed:
    """How fast this machine computes in one dtype."""

    dtype: str
    weights: tuple[float, ...]  # seconds a weight takes, at each of ROWS
    per_layer: float  # seconds of a layer without its matrices
    bandwidth: float  # bytes read from memory
    flops: float  # of convolutions

    def per_weight(self, rows: float) -> float:
        """Seconds of one weight for `rows` tokens, interpolated between the measured counts."""
        if rows == 0:
            return 0.0
        if rows >= MEASURED_ROWS[-1]:
            return self.weights[-1] * rows / MEASURED_ROWS[-1]
        above = next(i for i, known in enumerate(MEASURED_ROWS) if known >= rows)
        if above == 0:
            return self.weights[0]
        share = (rows - MEASURED_ROWS[above - 1]) / (MEASURED_ROWS[above] - MEASURED_ROWS[above - 1])
        return self.weights[above - 1] * (1 - share) + self.weights[above] * share

    def seconds(self, cost: Cost) -> float:
        """Seconds that a task should take."""
        caches = cost.seen * (2 if self.dtype == "bfloat16" else 4) / self.bandwidth
        step = cost.weights * self.per_weight(cost.rows) + cost.layers * self.per_layer + caches
        return cost.steps * step + cost.weights * self.per_weight(cost.before) + cost.flops / self.flops

    @classmethod
    def measure(cls, dtype: str) -> "Speed":
        """Measure the operations of generation for two seconds."""
        wide = nn.Linear(2048, 8192).requires_grad_(False)
        copies = [_as(wide, dtype) for _ in range(8)]  # more than the caches hold
        weights = []
        for rows in MEASURED_ROWS:
            x = torch.randn(rows, 2048, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
            taken = _fastest(partial(_through, copies, x))
            weights.append(taken / (8 * wide.weight.numel()))
        image = torch.randn(1, 128, 96, 96)
        kernel = torch.randn(128, 128, 3, 3)
        conv = _fastest(lambda: nn.functional.conv2d(image, kernel, padding=1))
        return cls(dtype, tuple(weights), _per_layer(), bandwidth(), 2 * image.numel() * 128 * 9 / conv)


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
    best = float("inf")
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or best == float("inf"):
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
    return best


def _per_layer() -> float:
    """Seconds of a layer whose matrices are tiny."""
    config = TransformerConfig(2, 16, 2, 40, 8, 9, 10, text_len=2, grid=2)
    model, layout = DualChannelTransformer(Base(config)).eval(), Layout.image(2, 2)
    with torch.inference_mode():
        cache = model.new_cache(layout, 1)
        model.prefill(torch.full((1, 2), 20), layout, cache)
        token = torch.zeros(1, 1, dtype=torch.long)
        return _fastest(lambda: model.step(token, cache, [0])) / config.layers


@dataclass(frozen=True)
class Estimate:
    """What generation of `videos` at a time needs: memory, and the cost of each task."""

    spec: Spec
    sampling: dict[str, Sampling]
    dtype: str
    videos: int = 1
    device: torch.device | str = "cpu"

    @cached_property
    def costs(self) -> list[Cost]:
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
        """A table of memory and tasks, with the seconds of each if a speed was measured."""
        lines = [f"{'memory':<16}{'GB':>8}"]
        lines += [f"{name:<16}{size / 1e9:>8.2f}" for name, size in self.held.items()]
        have = "" if self.free is None else f"  of {self.free / 1e9:.1f} that are free"
        lines.append(f"{'all':<16}{sum(self.held.values()) / 1e9:>8.2f}{have}")
        if self.least < sum(self.held.values()):
            lines.append(f"{'at least':<16}{self.least / 1e9:>8.2f}  with one channel at a time")
        lines.append("")
        lines.append(f"{'task':<16}{'steps':>8}{'tokens':>10}{'MB/step':>10}{'seconds' if speed else '':>10}")
        for cost in self.costs:
            seconds = f"{speed.seconds(cost):.1f}" if speed else ""
            counts = f"{cost.steps:>8}{cost.tokens:>10}{cost.read(self.dtype) / 1e6:>10.1f}"
            lines.append(f"{cost.name:<16}{counts if cost.steps else '':<28}{seconds:>10}")
        if speed:
            lines.append(f"{'all':<44}{sum(speed.seconds(cost) for cost in self.costs):>10.1f}")
        return "\n".join(lines)

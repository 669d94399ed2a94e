"""What bfloat16 is worth on this processor, or costs: matrix products, and an iteration of Muon.

    python -m benchmarks.bfloat16

Rounds alternate between float32 and bfloat16; the table has the median and the range over rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from cogvideo.hardware import gemm_rate, has_fast_bfloat16
from cogvideo.train.optim import orthogonalise

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of torch.optim.Muon
CPU = torch.device("cpu")


def product(dtype: torch.dtype) -> float:
    """GFLOPS of a product of square matrices."""
    return gemm_rate(CPU, str(dtype).removeprefix("torch.")) / 1e9


def muon(dtype: torch.dtype) -> float:
    """Seconds to orthogonalise the largest matrix of `tiny`."""
    matrix = torch.randn(1536, 384).to(dtype)
    begun = time.perf_counter()
    orthogonalise(matrix, COEFFICIENTS, 5, 1e-7)
    return time.perf_counter() - begun


def layer(dtype: torch.dtype) -> float:
    """Seconds of a linear layer of `tiny`, forward and backward, under autocast."""
    linear = nn.Linear(384, 1536)
    x = torch.randn(16, 288, 384)
    begun = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        linear(x).float().sum().backward()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description="what bfloat16 costs on this processor")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"bfloat16 in hardware: {'yes' if has_fast_bfloat16(CPU) else 'no'}; {args.threads} threads")
    print("| | float32 | bfloat16 | ratio |\n|---|---:|---:|---:|")
    row("matrix product, GFLOPS", product, args.rounds)
    row("Muon's iteration of a matrix, s", muon, args.rounds)
    row("linear layer, forward and backward, s", layer, args.rounds)


def row(name: str, measure: Callable[[torch.dtype], float], rounds: int) -> None:
    """Print a line of the table."""
    values: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(rounds):
        for dtype, seen in values.items():
            seen.append(measure(dtype))
    middles = [statistics.median(seen) for seen in values.values()]
    cells = []
    for middle, seen in zip(middles, values.values()):
        cells.append(f"{middle:.3g} ({min(seen):.3g} to {max(seen):.3g})")
    print(f"| {name} | {cells[0]} | {cells[1]} | {middles[1] / middles[0]:.3g} |", flush=True)


if __name__ == "__main__":
    main()

"""How long does a training step take, and how much memory?

    python -m benchmarks.train_memory --threads 2

Forward and backward of one clip through 12 layers of width 768 (12 heads, the released vocabulary, 20 x 20
tokens a frame), base frozen, float32. Each stage runs in a process of its own, so that its peak of memory is
its own.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch

from cogvideo.layout import Layout
from cogvideo.model import presets
from cogvideo.model.transformer import Base, DualChannelTransformer, TemporalChannel
from cogvideo.train.losses import token_loss

STAGES = ("stage1", "stage2")


def step(stage: str, runs: int) -> list[float]:
    """Seconds of forward and backward, of each run but the first."""
    c = replace(presets.find("cogvideo-9b").model, layers=12, width=768, heads=12, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    base, temporal = Base(c), TemporalChannel(c, 0 if stage == "stage1" else c.window)
    for part in (base, temporal):
        part.init_weights(generator)
    model = DualChannelTransformer(base.requires_grad_(False), temporal)
    make = Layout.keyframes if stage == "stage1" else Layout.interpolation
    layout = make(c.text_len, c.grid, c.frames)
    text = torch.randint(c.codes, c.vocab, (1, c.text_len), generator=generator)
    codes = torch.randint(0, c.codes, (1, c.frames, c.frame_tokens), generator=generator)
    times = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        loss, _ = token_loss(model, layout, text, codes)
        loss.backward()
        times.append(time.perf_counter() - begin)
        temporal.zero_grad()
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.stage is None:
        print(f"{'':<8}{'seconds':>9}{'least':>8}{'most':>8}{'GB':>7}")
        for stage in STAGES:
            options = ["--stage", stage, "--threads", arguments.threads, "--runs", arguments.runs]
            subprocess.run([sys.executable, "-m", "benchmarks.train_memory", *map(str, options)], check=True)
        return
    times = step(arguments.stage, arguments.runs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    middle = statistics.median(times)
    print(f"{arguments.stage:<8}{middle:>9.2f}{min(times):>8.2f}{max(times):>8.2f}{peak:>7.1f}")


if __name__ == "__main__":
    main()

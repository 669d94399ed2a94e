"""How fast is generation, and where does the time go?

    python -m benchmarks.generate --model tiny

Prints the time of each verb for one video (median of --runs, least to most), tokens a second, the bytes a
step has to read (weights once for all rows, keys and values of every row), and what share of the machine's
measured memory bandwidth that is. Weights that fit the caches of the processor can exceed a share of 1. At
last the whole command, start of Python included. Measured against: the length of the video, since it should
be made in less time than it plays.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cogvideo import CogVideo
from cogvideo.layout import Layout
from cogvideo.model.transformer import DualChannelTransformer

PROMPT = "a dog runs to the right across a green field"
HEAD = f"{'seconds':>9}{'least':>8}{'most':>8}"
BYTES = {"int8": 1, "bfloat16": 2, "float32": 4}


def bandwidth(megabytes: int = 512, runs: int = 5) -> float:
    """Bytes a second that this machine reads from memory, the best of some runs."""
    block = torch.ones(megabytes * 2**20 // 4)
    best = float("inf")
    for _ in range(runs):
        begin = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - begin)
    return block.numel() * 4 / best


def step_bytes(pipe: CogVideo, model: DualChannelTransformer, layout: Layout, known: int, rows: int) -> float:
    """Bytes that a step of a fill reads on average: linear weights, head, and what the new token sees of the
    caches."""
    c = pipe.system.model
    matrices = 12 * c.width**2 + (4 * c.width**2 if model.temporal is not None else 0)
    weights = (c.layers * matrices + c.codes * c.width) * BYTES[pipe.dtype]
    seen = 0
    for kind in model.kinds:
        for shifted in (False, True):
            start, slot = layout.segments(kind, model.window, shifted)
            lengths = [slot[p] + 1 - start[p] for p in range(known * c.frame_len, layout.tokens)]
            seen += sum(lengths) / len(lengths) * c.layers / 2
    return weights + rows * seen * 2 * c.width * (2 if pipe.dtype == "bfloat16" else 4)


def timed(action: Callable[[], Any], runs: int) -> tuple[Any, list[float]]:
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        result = action()
        times.append(time.perf_counter() - begin)
    return result, times


def spread(times: list[float]) -> str:
    return f"{statistics.median(times):>9.2f}{min(times):>8.2f}{max(times):>8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pipe = CogVideo.from_pretrained(arguments.model, dtype=arguments.dtype)
    pipe(PROMPT, seed=0, progress=False)  # warm: parts loaded, masks made
    c, n = pipe.system.model, pipe.system.model.frame_len
    peak = bandwidth()
    print(f"{arguments.model}, {pipe.dtype}, {torch.get_num_threads()} threads, memory {peak / 1e9:.1f} GB/s")
    print(f"{'verb':<14}{HEAD}{'share':>8}{'tokens/s':>10}{'MB/step':>9}{'of memory':>11}")

    guided = {name: 2 if s.guidance_scale > 1 else 1 for name, s in pipe.sampling.items()}
    image = Layout.image(c.text_len, c.grid)
    keyframes = Layout.keyframes(c.text_len, c.grid, c.frames)
    between = Layout.interpolation(c.text_len, c.grid, c.frames)
    rows: list[tuple[str, list[float], int, float]] = []

    draft, times = timed(lambda: pipe.first_frames([PROMPT], [0]), arguments.runs)
    rows.append(("first frame", times, n, n * step_bytes(pipe, pipe.image_model, image, 0, guided["image"])))
    first = draft
    draft, times = timed(lambda: pipe.keyframes([PROMPT], [0], begin=first), arguments.runs)
    steps = (c.frames - 1) * n
    rows.append(
        ("key frames", times, steps, steps * step_bytes(pipe, pipe.stage1, keyframes, 1, guided["stage1"]))
    )
    while draft.fps < 8:
        windows, known = (draft.codes.shape[1] - 1) // 2, draft
        draft, times = timed(lambda known=known: pipe.interpolate(known), arguments.runs)  # type: ignore[misc]
        read = 2 * n * step_bytes(pipe, pipe.stage2, between, 3, windows * guided["stage2"])
        rows.append((f"to {draft.fps:g} fps", times, 2 * n * windows, read))
    last = replace(draft)
    clips, times = timed(lambda: pipe.decode(last), arguments.runs)
    rows.append(("decode", times, 0, 0.0))
    _, times = timed(lambda: pipe.upscale(clips), arguments.runs)
    rows.append(("upscale", times, 0, 0.0))

    total = sum(statistics.median(times) for _, times, _, _ in rows)
    for name, times, tokens, read in rows:
        middle = statistics.median(times)
        line = f"{name:<14}{spread(times)}{middle / total:>8.0%}"
        if tokens:
            steps = {"first frame": n, "key frames": 4 * n}.get(name, 2 * n)
            line += f"{tokens / middle:>10.0f}{read / steps / 1e6:>9.1f}{read / middle / peak:>11.2f}"
        print(line)
    frames, height, width, _ = pipe.upscale(clips)[0].frames.shape
    seconds = (frames - 1) / draft.fps
    print(f"{'all':<14}{total:>9.2f}  for {frames} frames of {width}x{height}, {seconds:g} s of video")

    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "a.mp4")
        command = [
            sys.executable,
            "-m",
            "cogvideo",
            "generate",
            PROMPT,
            "-o",
            out,
            "--model",
            arguments.model,
        ]
        _, times = timed(lambda: subprocess.run([*command, "--seed", "0", "--quiet"], check=True), 3)
    print(f"{'command':<14}{spread(times)}  start of Python to mp4")


if __name__ == "__main__":
    main()

"""How fast is generation, and where does the time go?

    python -m benchmarks.generate --model tiny
    python -m benchmarks.generate --model tiny --together 16      as many prompts in one call

Prints the time of each verb for one video (median of --runs, least to most), tokens a second (those without
the prompt too, where there is guidance), the bytes a step has to read (weights once for all rows, keys and
values of every row), and what share of the machine's measured memory bandwidth that is. Weights that fit the
caches of the processor can exceed a share of 1. At last the whole command for one video, start of Python
included. Measured against: the length of the video, since it should be made in less time than it plays.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cogvideo import CogVideo
from cogvideo.generate.estimate import Speed
from cogvideo.generate.regression import RegressionPipeline

PROMPT = "a dog runs to the right across a green field"
HEAD = f"{'seconds':>9}{'least':>8}{'most':>8}"


def verbs(pipe: Any, prompts: list[str], seeds: list[int]) -> dict[str, Callable[[Any], Any]]:
    """The verbs of videos in their order, each from what the one before it made; named as in
    `cogvideo.generate.cost.plan`."""
    if isinstance(pipe, RegressionPipeline):
        return {
            "frames": lambda nothing: pipe.regress(prompts, max(pipe.frame_counts)),
            "upscale": pipe.upscale,
        }
    planned = [one.name for one in pipe.estimate().costs]
    found = {
        "first frame": lambda nothing: pipe.first_frames(prompts, seeds),
        "key frames": lambda draft: pipe.keyframes(prompts, seeds, begin=draft),
        **dict.fromkeys([name for name in planned if name.startswith("to ")], pipe.interpolate),
        "larger frames": pipe.superresolve,
        "decode": pipe.decode,
        "upscale": pipe.upscale,
    }
    return {name: verb for name, verb in found.items() if name in planned}


def timed(action: Callable[[], Any], runs: int) -> tuple[Any, list[float]]:
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        result = action()
        times.append(time.perf_counter() - begin)
    return result, times


def time_verbs(pipe: Any, runs: int, count: int = 1) -> tuple[Any, dict[str, list[float]]]:
    """What the verbs make of `count` prompts in a row, and the seconds of each run of each."""
    pipe(PROMPT, progress=False, seed=0)  # warm: parts loaded, masks made
    value, taken = None, {}
    for name, verb in verbs(pipe, [PROMPT] * count, list(range(count))).items():
        value, taken[name] = timed(partial(verb, value), runs)
    return value, taken


def spread(times: list[float]) -> str:
    return f"{statistics.median(times):>9.2f}{min(times):>8.2f}{max(times):>8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--together", type=int, default=1, help="videos made in one call")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pipe = CogVideo.from_pretrained(arguments.model, dtype=arguments.dtype)
    value, taken = time_verbs(pipe, arguments.runs, arguments.together)
    memory = Speed.measure(pipe.dtype).bandwidth
    threads = torch.get_num_threads()
    print(f"{arguments.model}, {pipe.dtype}, {threads} threads, memory {memory / 1e9:.1f} GB/s")
    print(f"{'verb':<14}{HEAD}{'share':>8}{'tokens/s':>10}{'MB/step':>9}{'of memory':>11}")

    plan = {one.name: one for one in pipe.estimate(arguments.together).costs}
    total = sum(map(statistics.median, taken.values()))
    for name, times in taken.items():
        work, middle = plan[name], statistics.median(times)
        line = f"{name:<14}{spread(times)}{middle / total:>8.0%}"
        if work.steps:
            read = work.read(pipe.dtype)
            share = work.steps * read / middle / memory
            line += f"{work.tokens / middle:>10.0f}{read / 1e6:>9.1f}{share:>11.2f}"
        print(line)
    clip = value[0]
    frames, height, width, _ = clip.frames.shape
    seconds = (frames - 1) / clip.fps
    many = f", {total / arguments.together:.2f} s each" if arguments.together > 1 else ""
    print(f"{'all':<14}{total:>9.2f}  for {frames} frames of {width}x{height}, {seconds:g} s of video{many}")
    if arguments.together > 1:
        return

    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "a.mp4")
        command = [sys.executable, "-m", "cogvideo", "generate", PROMPT, "-o", out]
        command += ["--model", arguments.model, "--quiet", "--seed", "0"]
        _, times = timed(lambda: subprocess.run(command, check=True), min(3, arguments.runs))
    print(f"{'command':<14}{spread(times)}  start of Python to mp4")


if __name__ == "__main__":
    main()

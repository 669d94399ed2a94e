"""How fast do videos become batches, against decoding alone?

    python -m benchmarks.decode

Writes --videos mp4 files of rendered scenes (--size pixels, --fps, 8 s), then takes clips of 33 frames at
8 frames a second out of them, on one thread: frames that had to be decoded a second, through the loader
(open, seek, decode, crop, make small, stack), and by PyAV alone, which only opens the same files, seeks to
the same places and decodes as far. Medians of --runs, which take turns; before them a first one, in which the
loader also finds out lengths and rates, which it keeps.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch

from cogvideo.data.cut import ClipSpec
from cogvideo.data.loader import batches
from cogvideo.data.sources import open_source
from cogvideo.data.tinyworld import TinyWorld, render, sprites
from cogvideo.data.videos import Videos
from cogvideo.video import Clip

CUT = ClipSpec(33, (8,), sizes=(48,))


def write(folder: Path, videos: int, size: int, fps: float) -> Videos:
    """Videos of two scenes each."""
    world = TinyWorld(sprites(32), 5)
    times = np.arange(int(4 * fps)) / fps
    for i in range(videos):
        frames = np.concatenate([render(world[2 * i + k].scene, times, size) for k in range(2)])
        Clip(frames, fps).save(folder / f"{i}.mp4")
        (folder / f"{i}.txt").write_text("a scene")
    source = open_source(folder)
    assert isinstance(source, Videos)
    return source


class Told:
    """A source that remembers which files and times were asked for."""

    def __init__(self, source: Videos):
        self.source, self.asked = source, []
        self.count, self.skipped, self.name, self.caption = source.count, {}, source.name, source.caption

    def __getitem__(self, index: int):
        recording, source = self.source[index], self

        class Listening(type(recording)):
            def frames(self, times, size):
                source.asked.append((recording.video, min(times), max(times)))
                return recording.frames(times, size)

        return Listening(recording.video, recording.captions)


def alone(asked: list) -> int:
    """Decode what the loader had to, and do nothing with it."""
    count = 0
    for video, first, last in asked:
        with av.open(str(video.data)) as container:
            if first > 2:
                container.seek(int((first + video.start - 1) * 1e6))
            for frame in container.decode(container.streams.video[0]):
                count += 1
                if frame.time - video.start >= last:
                    break
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--fps", type=float, default=24.0)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"loader": [], "PyAV alone": []}
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder), arguments.videos, arguments.size, arguments.fps)
        told = Told(source)
        for run in range(1 + arguments.runs):
            told.asked.clear()
            loader = batches(told, CUT, arguments.clips, seed=2 + run)
            begin = time.perf_counter()
            next(loader)
            taken = time.perf_counter() - begin
            begin = time.perf_counter()
            count = alone(told.asked)
            times["PyAV alone"].append(count / (time.perf_counter() - begin))
            times["loader"].append(count / taken)
    first = {name: rates.pop(0) for name, rates in times.items()}
    middle = {name: statistics.median(rates) for name, rates in times.items()}
    print(f"frames decoded a second, {arguments.size} px at {arguments.fps:g} fps, one thread")
    for name, rates in times.items():
        print(f"{name:<12}{middle[name]:>8.0f}  ({min(rates):.0f} to {max(rates):.0f})")
    print(
        f"share       {middle['loader'] / middle['PyAV alone']:>8.2f}  "
        f"(the first time {first['loader'] / first['PyAV alone']:.2f})"
    )


if __name__ == "__main__":
    main()

"""The process that decodes one upload: with limits of time, memory and pixels, and nothing else to lose.

    python -m cogvideo.serve.decoding SIDE FPS FRAMES < file > kind, newline, frames.npz

An image becomes one frame, a video its last frames, as far apart as key frames: what generation starts with.
Exit code 2 says that the file cannot be read, with one line why.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np

from cogvideo.video import Clip, VideoFile, read_image

SECONDS = 20.0  # of one upload
MEMORY = 3 * 2**30  # bytes of address space
MAX_VIDEO_SECONDS = 600.0
PICTURES = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"RIFF": ".webp",
    b"BM": ".bmp",
}  # by their first bytes


def decode(data: bytes, side: int, fps: float, frames: int) -> tuple[str, Clip]:
    """ "image" or "video", and at most `frames` frames at `fps`, `side` pixels square."""
    suffix = next((ending for start, ending in PICTURES.items() if data.startswith(start)), "")
    if suffix == ".webp" and data[8:12] != b"WEBP":
        suffix = ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "upload" + (suffix or (".gif" if data.startswith(b"GIF8") else ".mp4")))
        file.write_bytes(data)
        try:
            if suffix:
                return "image", Clip(read_image(file, 4 * side)[None], fps).square(side)
            return "video", _last_frames(VideoFile.open(file, "the file"), side, fps, frames)
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), "the file")) from None


def _last_frames(video: VideoFile, side: int, fps: float, frames: int) -> Clip:
    if video.seconds > MAX_VIDEO_SECONDS:
        raise ValueError(
            f"the video lasts {video.seconds:.0f} s; at most {MAX_VIDEO_SECONDS:.0f} s are possible"
        )
    before_end = np.arange(frames - 1, -1, -1) / fps  # seconds
    times = video.seconds - before_end[before_end <= video.seconds]
    return Clip(video.frames(times, 4 * side), fps).square(side)


def _limit() -> None:
    """Take no more memory and processor time than an honest upload needs, where the system has limits."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS), int(SECONDS)))


def main() -> int:
    _limit()
    side, fps, frames = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    try:
        kind, clip = decode(sys.stdin.buffer.read(), side, fps, frames)
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except MemoryError:
        print("the file needs too much memory", file=sys.stderr)
        return 2
    stored = io.BytesIO()
    np.savez(stored, frames=clip.frames, fps=clip.fps)
    sys.stdout.buffer.write(kind.encode() + b"\n" + stored.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())

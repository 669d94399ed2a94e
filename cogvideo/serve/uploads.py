"""Images and videos of clients: decoded in a separate process, one at a time."""

import io
import subprocess
import sys
from dataclasses import dataclass
from threading import Lock

import numpy as np

from cogvideo.serve.decoding import SECONDS
from cogvideo.serve.request import Refusal
from cogvideo.video import Clip

_one = Lock()  # upload at a time


@dataclass(frozen=True)
class Beginning:
    """What a video starts with: kind "image" or "video", how many frames, and these as .npz."""

    kind: str
    frames: int
    data: bytes


def decode(data: bytes, side: int, fps: float, frames: int) -> Beginning:
    """Decode an upload to at most `frames` frames at `fps`, `side` pixels square; Refusal if it cannot be
    read."""
    command = [sys.executable, "-m", "cogvideo.serve.decoding", str(side), str(fps), str(frames)]
    with _one:
        try:
            done = subprocess.run(command, input=data, capture_output=True, timeout=SECONDS + 5)
        except subprocess.TimeoutExpired:
            raise Refusal(f"it takes longer than {SECONDS:g} s to read", "input_reference") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if done.returncode == 2 and lines else "the file cannot be read"
        raise Refusal(f"input_reference: {reason}", "input_reference")
    kind, _, stored = done.stdout.partition(b"\n")
    return Beginning(kind.decode(), len(load(stored).frames), stored)


def load(data: bytes) -> Clip:
    """The frames of a beginning."""
    with np.load(io.BytesIO(data)) as stored:
        return Clip(stored["frames"], float(stored["fps"]))

"""What is measured, spelled out: a number without its protocol cannot be compared with another.

A `Protocol` says how a video becomes the frames that a network sees. Presets spell out those of papers as far
as the papers do.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from cogvideo.limits import MOST_SEED, check_range

FILTERS = ("nearest", "bilinear", "bicubic", "lanczos", "area")
CROPS = ("centre", "none")
STARTS = ("first", "middle", "random")
ORDERS = ("crop-resize", "resize-crop")


@dataclass(frozen=True)
class Protocol:
    """How clips are cut out of videos. Frames are chosen by their time stamps, never by their numbers."""

    frames: int = 16
    fps: float = 8.0
    start: str = (
        "first"  # of the clip in the video: first, middle, or random (by the seed and the video's name)
    )
    size: int = 64  # pixels a side
    crop: str = "centre"  # the middle square; none: the frame is squeezed to a square
    filter: str = (
        "bicubic"  # of resizing, with antialiasing, by Pillow; area: the mean over each pixel's area
    )
    order: str = "crop-resize"
    short: str = "refuse"  # videos that are too short: refuse, skip, or repeat their last frame
    count: int | None = None  # clips on both sides, chosen by the seed; None: all
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("frames", 1, 1024), ("size", 8, 2048), ("seed", 0, MOST_SEED)):
            check_range(name, getattr(self, name), low, high)
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps must be more than 0 and at most 1000; got {self.fps:g}")
        check_range("count", self.count, 2)
        choices = {"start": STARTS, "crop": CROPS, "filter": FILTERS, "order": ORDERS}
        choices["short"] = ("refuse", "skip", "repeat")
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}; got {getattr(self, name)!r}")

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        return (self.frames - 1) / self.fps

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Preset:
    """A protocol of the literature, with what it is for."""

    about: str
    protocol: Protocol
    extractors: tuple[str, ...]


PRESETS = {
    "tinyworld": Preset(
        "clips of 33 frames at 8 fps of the tiny world, as this project's own results use them",
        Protocol(frames=33, fps=8, size=96, filter="area"),
        ("efficientnet-lite0", "tinyworld"),
    ),
    "ucf101": Preset(
        "CogVideo section 5.1, by the code of TATS: 16 consecutive frames at 25 fps, 128 px; Frechet "
        "distance "
        "of I3D features over 2,048 clips, Inception Score of C3D over 10,000 (run it again with --count "
        "10000)",
        Protocol(frames=16, fps=25, start="random", size=128, filter="bilinear", count=2048, short="skip"),
        ("i3d", "c3d"),
    ),
    "kinetics600": Preset(
        "CogVideo section 5.1: 16 frames of 64 px, of which a model is given 5; Frechet distance of I3D "
        "features. The paper does not say how many clips; later ones take 50,000",
        Protocol(frames=16, fps=25, start="random", size=64, filter="bilinear", short="skip"),
        ("i3d",),
    ),
    "msrvtt": Preset(
        "zero-shot text to video on the 2,990 test captions of MSR-VTT: CLIP similarity of frames and "
        "captions, Frechet distance of Inception features of single frames",
        Protocol(frames=16, fps=8, size=224, count=2990, short="repeat"),
        ("clip", "inception"),
    ),
}


def find_preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def changed(protocol: Protocol, values: dict[str, Any]) -> Protocol:
    """With the values that are not None."""
    known = {field.name for field in fields(protocol)}
    assert values.keys() <= known
    return replace(protocol, **{name: value for name, value in values.items() if value is not None})

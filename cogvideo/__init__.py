"""Text to video by the method of CogVideo (Hong et al., 2022).

from cogvideo import CogVideo
clips = CogVideo.from_pretrained("tiny")("a dog runs to the right across a green field", seed=7)
clips[0].save("dog.mp4")
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cogvideo.generate.cogvideo import CogVideo, load
    from cogvideo.generate.pipeline import Pipeline
    from cogvideo.video import Clip

__all__ = ["Clip", "CogVideo", "Pipeline", "load"]
__version__ = "0.2.0"

_EXPORTS = {
    "Clip": "cogvideo.video",
    "CogVideo": "cogvideo.generate.cogvideo",
    "Pipeline": "cogvideo.generate.pipeline",
    "load": "cogvideo.generate.cogvideo",
}


def __getattr__(name: str) -> object:
    # torch takes seconds to import; the command line and its help must not wait for it
    if name not in _EXPORTS:
        raise AttributeError(f"module 'cogvideo' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)

"""Text to video by the method of CogVideo (Hong et al., 2022).

from cogvideo import CogVideo
clips = CogVideo.from_pretrained("tiny")("a dog runs to the right across a green field", seed=7)
clips[0].save("dog.mp4")
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cogvideo.generate.cogvideo import CogVideo
    from cogvideo.video import Clip

__all__ = ["Clip", "CogVideo"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # torch takes seconds to import; the command line and its help must not wait for it
    if name == "CogVideo":
        from cogvideo.generate.cogvideo import CogVideo

        return CogVideo
    if name == "Clip":
        from cogvideo.video import Clip

        return Clip
    raise AttributeError(f"module 'cogvideo' has no attribute {name!r}")

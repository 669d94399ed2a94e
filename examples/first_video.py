"""The first video: python examples/first_video.py writes first.mp4, in seconds."""

from cogvideo import CogVideo

pipe = CogVideo.from_pretrained("tiny")
(clip,) = pipe("a dog runs to the right across a green field", seed=7)
clip.save("first.mp4")
print(f"first.mp4: {len(clip.frames)} frames at {clip.fps:g} fps")

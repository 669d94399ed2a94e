"""The tiny world: captioned clips of an animated sprite that moves over a drawn place, any size, from a seed.

    own        worlds of users' artwork, as folders
    artwork    pictures with transparency become such a folder
    gallery    such a world to look at, and its held-out clips
    cast       who: 96 animated sprites
    places     where: ten places, each drawn in many looks
    scene      a sprite, a motion, a place and the numbers that vary; what goes together; where the object is
    picture    a scene at given times and size, as frames
    canvas     the same on any device, many frames at a time
    words      what things are called, in English and Chinese
    phrasing   a scene as a sentence
    reading    a sentence as a sprite, a motion and a place
    world      scenes by index, as a `Source` to train on

Notable:
- A `Scene` is a few names and numbers that determine every frame, at any time and any size. A pixel is the
  mean over its square: the same scene at 48 and 192 pixels is the same image.
- Directions, ground lines, water lines and shadows are real, and the caption says only what is visible.
- One in eight (sprite, motion, place) triples is held out by a fixed rule on the names: `Scene.held_out`.

Coordinates are fractions of the frame, y down. A clip lasts `SECONDS`.
"""

from cogvideo.data.tinyworld.cast import sprites
from cogvideo.data.tinyworld.phrasing import caption
from cogvideo.data.tinyworld.picture import cover, render
from cogvideo.data.tinyworld.places import LAND, LOOKS, PLACES, draw_place
from cogvideo.data.tinyworld.scene import MOTIONS, SECONDS, Scene, allowed, path, sample_scene
from cogvideo.data.tinyworld.words import names_of
from cogvideo.data.tinyworld.world import SceneVideo, TinyWorld

__all__ = [
    "LAND",
    "LOOKS",
    "MOTIONS",
    "PLACES",
    "SECONDS",
    "Scene",
    "SceneVideo",
    "TinyWorld",
    "allowed",
    "caption",
    "cover",
    "draw_place",
    "names_of",
    "path",
    "render",
    "sample_scene",
    "sprites",
]

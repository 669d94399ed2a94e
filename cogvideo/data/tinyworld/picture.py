"""A scene as frames: the place, a shadow, and the sprite on top; a pixel is the mean over its square."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from cogvideo.data.tinyworld.cast import FPS, LOOP, find, loop_of, shape
from cogvideo.data.tinyworld.places import draw_place
from cogvideo.data.tinyworld.scene import Scene, path
from cogvideo.video import Frames

MARGIN = 32  # pixels around a sprite that is rotated, for its corners

Box = tuple[int, int, int, int]  # left, top, right, bottom


def _overlap(edges: np.ndarray, count: int) -> np.ndarray:
    """Weights [len(edges) - 1, count]: the means between edges of `count` samples, interpolated linearly."""
    u = np.clip(edges[:, None] - np.arange(count) - 0.5, -1, 1)
    area = np.where(u < 0, (1 + u) ** 2, 2 - (1 - u) ** 2) / 2
    weights: np.ndarray = np.diff(area, axis=0) / np.diff(edges)[:, None]
    return weights.astype(np.float32)


def _draw_sprite(canvas: np.ndarray, rgba: np.ndarray, box: Box, x: float, y: float, size: float) -> None:
    """Draw premultiplied `rgba` [96, 96, 4] on `canvas` [S, S, 3] with the centre of its `box` at (x, y)."""
    left, top, right, bottom = box
    scale = (
        size * len(canvas) / max(right - left, bottom - top)
    )  # pixels of the canvas per pixel of the sprite
    spans = []
    weights = []
    for centre, low, high in ((y, top, bottom), (x, left, right)):
        origin = centre * len(canvas) - (low + high) / 2 * scale
        first = int(max(origin, 0))
        last = int(min(origin + len(rgba) * scale + 1, len(canvas)))
        if last <= first:
            return
        spans.append(slice(first, last))
        weights.append(_overlap((np.arange(first, last + 1) - origin) / scale, len(rgba)))
    patch = weights[0] @ rgba.astype(np.float32).reshape(len(rgba), -1)  # [h, 96 * 4]
    patch = np.matmul(weights[1], patch.reshape(len(patch), -1, 4))  # [h, w, 4]
    part = canvas[spans[0], spans[1]]
    part += patch[..., :3] - part * (patch[..., 3:] / 255)


def _draw_shadow(canvas: np.ndarray, scene: Scene, x: float, y: float, size: float, foot: float) -> None:
    """A soft shadow under the object, or foam at sea; fainter under a hop."""
    at = (np.arange(len(canvas), dtype=np.float32) + 0.5) / len(canvas)
    width, height = (size * part for part in shape(scene.sprite))
    faint = 1 / (1 + 6 * max(foot - height / 2 - y, 0))
    down = np.exp(-(((at - foot + 0.01) / 0.03) ** 2))
    along = np.exp(-(((at - x) / (0.46 * width)) ** 4))
    spot = np.outer(down, along)
    colour = np.array((225, 242, 250) if scene.place == "sea" else (25, 25, 45), np.float32)
    canvas += (colour - canvas) * (0.45 * faint * spot)[..., None].astype(np.float32)


def _rotate(rgba: np.ndarray, box: Box, degrees: float) -> tuple[np.ndarray, Box]:
    """Image and box with a margin for the corners, rotated clockwise about the centre of the box."""
    rgba = np.pad(rgba, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    left, top, right, bottom = (edge + MARGIN for edge in box)
    centre = ((left + right) / 2, (top + bottom) / 2)
    rotated = []
    for channel in range(4):
        image = Image.fromarray(np.ascontiguousarray(rgba[..., channel]))
        rotated.append(np.asarray(image.rotate(-degrees, Image.Resampling.BICUBIC, center=centre)))
    return np.stack(rotated, -1), (left, top, right, bottom)


def _moves(scene: Scene, times: np.ndarray) -> Iterator[tuple[np.ndarray, Box, float, float, float, float]]:
    """The sprite at each of `times`: premultiplied RGBA, its box, centre x, y, size and foot line."""
    sprite = find(scene.sprite)
    loop = loop_of(scene.sprite)
    left, top, right, bottom = sprite["bbox"]
    if {"left": -1, "right": 1}.get(sprite["facing"], scene.handed) != scene.handed:
        width = loop.shape[2]
        loop = loop[:, :, ::-1]
        left, right = width - right, width - left

    for time, x, y, size, turn, foot in zip(times, *path(scene, times), strict=True):
        step = int(np.floor(time * FPS + 1e-6) + scene.phase)
        rgba: np.ndarray = loop[step % LOOP]
        box = (left, top, right, bottom)
        if turn:
            rgba, box = _rotate(rgba, box, turn)
        yield rgba, box, x, y, size, foot


def render(scene: Scene, times: Sequence[float] | np.ndarray, size: int) -> Frames:
    """The scene at `times` (seconds, 0..4) as frames, uint8 [F, size, size, 3]."""
    times = np.asarray(times, np.float64)
    empty = draw_place(scene.place, scene.look, size)
    out = np.empty((len(times), size, size, 3), np.uint8)
    for i, (rgba, box, x, y, side, foot) in enumerate(_moves(scene, times)):
        canvas = empty.copy()
        if scene.stands:
            _draw_shadow(canvas, scene, x, y, side, foot)
        _draw_sprite(canvas, rgba, box, x, y, side)
        out[i] = np.clip(canvas + 0.5, 0, 255)
    return out


def cover(scene: Scene, times: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
    """The share of each pixel that the object covers at `times` (seconds), float32 [F, size, size], 0..1."""
    times = np.asarray(times, np.float64)
    out = np.zeros((len(times), size, size), np.float32)
    for i, (rgba, box, x, y, side, _) in enumerate(_moves(scene, times)):
        canvas = np.zeros((size, size, 3), np.float32)
        _draw_sprite(canvas, np.repeat(rgba[..., 3:], 4, -1), box, x, y, side)  # white on black
        out[i] = canvas[..., 0] / 255
    return out

"""A scene as frames: the place, a shadow, and the sprite laid on it; a pixel is the mean over its square."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from cogvideo.data.tinyworld.cast import FPS, LOOP, loop_of, shape, table
from cogvideo.data.tinyworld.places import draw_place
from cogvideo.data.tinyworld.scene import Scene, path


def _overlap(edges: np.ndarray, count: int) -> np.ndarray:
    """Weights [len(edges) - 1, count]: the mean between two edges of `count` samples joined by lines."""
    u = np.clip(edges[:, None] - np.arange(count) - 0.5, -1, 1)
    area = np.where(u < 0, (1 + u) ** 2, 2 - (1 - u) ** 2) / 2
    return (np.diff(area, axis=0) / np.diff(edges)[:, None]).astype(np.float32)


def _draw_sprite(canvas: np.ndarray, rgba: np.ndarray, box: tuple, x: float, y: float, size: float) -> None:
    """Lay premultiplied `rgba` [96, 96, 4] on `canvas` [S, S, 3] with the centre of its `box` at (x, y)."""
    left, top, right, bottom = box
    scale = size * len(canvas) / max(right - left, bottom - top)  # pixels of the canvas for one of the sprite
    spans, weights = [], []
    for centre, low, high in ((y, top, bottom), (x, left, right)):
        origin = centre * len(canvas) - (low + high) / 2 * scale
        first, last = int(max(origin, 0)), int(min(origin + len(rgba) * scale + 1, len(canvas)))
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
    spot = np.outer(np.exp(-(((at - foot + 0.01) / 0.03) ** 2)), np.exp(-(((at - x) / (0.46 * width)) ** 4)))
    colour = np.array((225, 242, 250) if scene.place == "sea" else (25, 25, 45), np.float32)
    canvas += (colour - canvas) * (0.45 * faint * spot)[..., None].astype(np.float32)


def _turned(rgba: np.ndarray, box: tuple, degrees: float) -> tuple[np.ndarray, tuple]:
    """Picture and box with a margin for the corners, turned clockwise about the centre of the box."""
    rgba, box = np.pad(rgba, ((32, 32), (32, 32), (0, 0))), tuple(b + 32 for b in box)
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    channels = (Image.fromarray(np.ascontiguousarray(rgba[..., c])) for c in range(4))
    turned = [np.asarray(c.rotate(-degrees, Image.Resampling.BICUBIC, center=centre)) for c in channels]
    return np.stack(turned, -1), box


def _moves(scene: Scene, times: np.ndarray) -> Iterator[tuple]:
    """The sprite at each of `times`: premultiplied RGBA, its box, centre x, y, size and foot line."""
    row, loop = table()[scene.sprite], loop_of(scene.sprite)
    left, top, right, bottom = row["bbox"]
    if {"left": -1, "right": 1}.get(row["facing"], scene.handed) != scene.handed:  # mirrored
        loop, left, right = loop[:, :, ::-1], loop.shape[2] - right, loop.shape[2] - left
    for time, x, y, side, turn, foot in zip(times, *path(scene, times), strict=True):
        step = int(np.floor(time * FPS + 1e-6) + scene.phase)
        rgba, box = loop[step % LOOP], (left, top, right, bottom)
        if turn:
            rgba, box = _turned(rgba, box, turn)
        yield rgba, box, x, y, side, foot


def render(scene: Scene, times: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
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

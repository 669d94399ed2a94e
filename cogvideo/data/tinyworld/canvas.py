"""The pictures of `picture.py` on any device, many at a time: a few large operations instead of many small
ones, so that a GPU never waits for its data.

What a frame shows is a row of numbers (`views`, cheap, made anywhere); `Canvas` holds the sprites' loops and
the empty places, and turns rows into pictures. Both ways of drawing agree but for rounding.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo.data.tinyworld.cast import FPS, LOOP, loop_of, table
from cogvideo.data.tinyworld.places import LOOKS, PLACES, draw_place
from cogvideo.data.tinyworld.scene import Scene, path
from cogvideo.hardware import constant

MARGIN = 32  # pixels around a sprite that turns, for its corners
COLUMNS = ("place", "sprite", "step", "mirrored", "turn", "x", "y", "size", "foot", "stands")


def views(scene: Scene, times: Sequence[float] | np.ndarray) -> np.ndarray:
    """What the frames at `times` (seconds, 0..4) show: float64 [F, len(COLUMNS)]."""
    times = np.asarray(times, np.float64)
    x, y, size, turn, foot = path(scene, times)
    row = table()[scene.sprite]
    found = np.empty((len(times), len(COLUMNS)))
    found[:, 0] = PLACES.index(scene.place) * LOOKS + scene.look
    found[:, 1] = row["rank"]
    found[:, 2] = (np.floor(times * FPS + 1e-6) + scene.phase) % LOOP
    found[:, 3] = {"left": -1, "right": 1}.get(row["facing"], scene.handed) != scene.handed
    found[:, 4:9] = np.stack((turn, x, y, size, foot), 1)
    found[:, 9] = scene.stands
    return found


class Canvas:
    """Draws views as frames of `size` pixels a side."""

    def __init__(self, size: int, device: torch.device | str = "cpu", processes: int = 1):
        """Takes a second or two a thousand places, shared out to `processes`."""
        self.size, self.device = size, torch.device(device)
        rows = sorted(table().values(), key=lambda row: row["rank"])
        self.ranks = torch.zeros(max(row["rank"] for row in rows) + 1, dtype=torch.long)
        self.ranks[[row["rank"] for row in rows]] = torch.arange(len(rows))
        self.ranks = self.ranks.to(device)
        loops = np.stack([loop_of(row["name"]) for row in rows])
        loops = loops.transpose(0, 1, 4, 2, 3)  # [S, 24, 4, 96, 96]
        self.loops = torch.from_numpy(loops).to(device).contiguous()
        self.boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32, device=device)
        self.places = self._draw_places(processes).to(device)  # [places * LOOKS, 3, size, size]

    def _draw_places(self, processes: int) -> Tensor:
        rows = [(place, look, self.size) for place, look in product(PLACES, range(LOOKS))]
        found = np.empty((len(rows), 3, self.size, self.size), np.float16)
        if processes == 1:
            for k, row in enumerate(rows):
                found[k] = _place(row)
            return torch.from_numpy(found)
        with ProcessPoolExecutor(processes) as pool:
            for k, one in enumerate(pool.map(_place, rows, chunksize=16)):
                found[k] = one
        return torch.from_numpy(found)

    @torch.no_grad()
    def draw(self, rows: np.ndarray | Tensor) -> Tensor:
        """Views [M, len(COLUMNS)] as frames, float32 [M, 3, size, size] in 0..1, in steps of 1/255."""
        v = self._read(rows)
        frames = self._ground(v)
        for chosen, rgba, box in self._sprites(v):
            layer = self._lay(rgba, box, _of(v, chosen), self.size)
            frames[chosen] = _over(frames[chosen], layer)
        return _rounded(frames)

    @torch.no_grad()
    def cover(self, rows: np.ndarray | Tensor, cells: int) -> Tensor:
        """The share of each of cells x cells that the object covers: float32 [M, cells, cells], 0..1."""
        v = self._read(rows)
        found = torch.zeros(len(v["x"]), cells, cells, device=self.device)
        for chosen, rgba, box in self._sprites(v):
            found[chosen] = self._lay(rgba[:, 3:], box, _of(v, chosen), cells)[:, 0] / 255
        return found

    @torch.no_grad()
    def both(self, rows: Tensor, cells: int) -> tuple[Tensor, Tensor]:
        """Frames and cover of views on the device, by operations that are the same whatever is drawn, so that
        a CUDA graph can hold them. What turns is sampled by `grid_sample`; its edges differ by some levels.
        """
        v = self._read(rows)
        rgba, box = self._loops(v)
        box = box + MARGIN
        rgba = _turn_fast(F.pad(rgba, (MARGIN,) * 4), box, v["turn"])
        frames = _over(self._ground(v), self._lay(rgba, box, v, self.size))
        return _rounded(frames), self._lay(rgba[:, 3:], box, v, cells)[:, 0] / 255

    def _read(self, rows: np.ndarray | Tensor) -> dict[str, Tensor]:
        columns = torch.as_tensor(rows).to(self.device, torch.float32, non_blocking=True).unbind(1)
        return dict(zip(COLUMNS, columns, strict=True))

    def _ground(self, v: dict[str, Tensor]) -> Tensor:
        """Places with the shadows of what stands there."""
        frames = self.places[v["place"].long()].float()
        self._shade(frames, v)
        return frames

    def _shade(self, frames: Tensor, v: dict[str, Tensor]) -> None:
        """The soft shadow of what stands, or foam at sea; fainter under a hop."""
        boxes = self.boxes[self.ranks[v["sprite"].long()]]
        sides = torch.stack((boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]), 1)
        width, height = (v["size"][:, None] * sides / sides.amax(1, keepdim=True)).unbind(1)
        faint = v["stands"] / (1 + 6 * (v["foot"] - height / 2 - v["y"]).clamp_min(0))
        at = (torch.arange(self.size, device=self.device) + 0.5) / self.size
        down = (-(((at - v["foot"][:, None] + 0.01) / 0.03) ** 2)).exp()
        along = (-(((at - v["x"][:, None]) / (0.46 * width[:, None])) ** 4)).exp()
        spot = (0.45 * faint)[:, None, None] * down[:, :, None] * along[:, None, :]  # [M, S, S]
        at_sea = v["place"].long() // LOOKS == PLACES.index("sea")
        foam, dark = (constant(colour, frames) for colour in ((225, 242, 250), (25, 25, 45)))
        colour = torch.where(at_sea[:, None], foam, dark)[:, :, None, None]
        frames += (colour - frames) * spot[:, None]

    def _sprites(self, v: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Those that do not turn, then those that do: which they are, RGBA [K, 4, n, n], boxes [K, 4]."""
        for turns in (False, True):
            chosen = ((v["turn"] != 0) == turns).nonzero().squeeze(1)
            if not len(chosen):
                continue
            rgba, box = self._loops(_of(v, chosen))
            if turns:
                box = box + MARGIN
                rgba = _turn(F.pad(rgba, (MARGIN,) * 4), box, v["turn"][chosen])
            yield chosen, rgba, box

    def _loops(self, v: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sprites in their steps, facing as they should: RGBA [K, 4, n, n], boxes [K, 4]."""
        number = self.ranks[v["sprite"].long()]
        rgba = self.loops[number, v["step"].long()].float()
        left, top, right, bottom = self.boxes[number].unbind(1)
        mirrored, side = v["mirrored"] > 0, rgba.shape[-1]
        rgba = torch.where(mirrored[:, None, None, None], rgba.flip(3), rgba)
        sides = (torch.where(mirrored, side - right, left), torch.where(mirrored, side - left, right))
        return rgba, torch.stack((sides[0], top, sides[1], bottom), 1)

    def _lay(self, rgba: Tensor, box: Tensor, v: dict[str, Tensor], size: int) -> Tensor:
        """Sprites [K, C, n, n] at their places in a frame of `size`: [K, C, size, size]."""
        left, top, right, bottom = box.unbind(1)
        scale = v["size"] * size / torch.maximum(right - left, bottom - top)
        down = _overlap(v["y"], (top + bottom) / 2, scale, size, rgba.shape[-1])
        along = _overlap(v["x"], (left + right) / 2, scale, size, rgba.shape[-1])
        return down[:, None] @ rgba @ along[:, None].transpose(2, 3)


def _place(row: tuple[str, int, int]) -> np.ndarray:
    return draw_place(*row).transpose(2, 0, 1).astype(np.float16)


def _of(v: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    return {name: column[chosen] for name, column in v.items()}


def _over(frames: Tensor, layer: Tensor) -> Tensor:
    """RGB [K, 3, n, n] under premultiplied RGBA [K, 4, n, n]."""
    return frames + layer[:, :3] - frames * (layer[:, 3:] / 255)


def _rounded(frames: Tensor) -> Tensor:
    return frames.add_(0.5).clamp_(0, 255).floor_().div_(255)


def _overlap(centre: Tensor, middle: Tensor, scale: Tensor, size: int, count: int) -> Tensor:
    """Weights [K, size, count]: what each of `count` samples joined by lines adds to each pixel's mean."""
    origin = centre * size - middle * scale
    edges = (torch.arange(size + 1, device=scale.device) - origin[:, None]) / scale[:, None]  # [K, size + 1]
    u = (edges[:, :, None] - torch.arange(count, device=scale.device) - 0.5).clamp(-1, 1)
    area = torch.where(u < 0, (1 + u) ** 2, 2 - (1 - u) ** 2) / 2
    return area.diff(dim=1) / edges.diff(dim=1)[:, :, None]


def _turn(rgba: Tensor, box: Tensor, degrees: Tensor) -> Tensor:
    """Pictures [K, C, n, n] turned clockwise about the centres of their boxes [K, 4], as Pillow's bicubic
    `rotate` does."""
    n = rgba.shape[-1]
    angle = degrees.deg2rad()[:, None, None]
    cx, cy = ((box[:, i] + box[:, i + 2])[:, None, None] / 2 for i in (0, 1))
    at = torch.arange(n, device=rgba.device) + 0.5
    dx, dy = at[None, None, :] - cx, at[None, :, None] - cy
    x = angle.cos() * dx + angle.sin() * dy + cx - 0.5  # [K, n, n]
    y = -angle.sin() * dx + angle.cos() * dy + cy - 0.5
    inside = (x > -0.5) & (x < n - 0.5) & (y > -0.5) & (y < n - 0.5)
    flat, found = rgba.flatten(2), torch.zeros_like(rgba)
    for row, down in enumerate(_cubic(y - y.floor())):
        for column, along in enumerate(_cubic(x - x.floor())):
            yy = (y.floor().long() + row - 1).clamp(0, n - 1)
            xx = (x.floor().long() + column - 1).clamp(0, n - 1)
            index = (yy * n + xx).flatten(1)[:, None].expand(-1, flat.shape[1], -1)
            found += flat.gather(2, index).view_as(rgba) * (down * along)[:, None]
    return (found * inside[:, None]).clamp(0, 255).floor()


def _turn_fast(rgba: Tensor, box: Tensor, degrees: Tensor) -> Tensor:
    """`_turn` by one operation, whose cubic is a little softer."""
    n = rgba.shape[-1]
    angle = degrees.deg2rad()
    cosine, sine = angle.cos(), angle.sin()
    cx, cy = ((box[:, i] + box[:, i + 2]) / n - 1 for i in (0, 1))  # in -1..1, as grids are
    shift_x, shift_y = cx - cosine * cx - sine * cy, cy + sine * cx - cosine * cy
    moves = torch.stack((cosine, sine, shift_x, -sine, cosine, shift_y), 1).view(-1, 2, 3)
    grid = F.affine_grid(moves, list(rgba.shape), align_corners=False)
    return F.grid_sample(rgba, grid, mode="bicubic", align_corners=False).clamp(0, 255)


def _cubic(d: Tensor) -> tuple[Tensor, ...]:
    """Weights of four neighbours, `d` past the second."""
    return (-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, -(d**2) + d**3)

"""The frames of `picture.py` on any device, many at a time: few large operations instead of many small ones,
so that a GPU never waits for its data.

What a frame shows is a row of numbers (`views`, cheap, computed anywhere); `Canvas` holds the sprites' loops
and the empty places, and turns rows into frames. They equal those of `picture.render` up to rounding.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo.data.tinyworld.cast import FPS, LOOP, find, loop_of, table
from cogvideo.data.tinyworld.picture import MARGIN
from cogvideo.data.tinyworld.places import LOOKS, PLACES, draw_place
from cogvideo.data.tinyworld.scene import Scene, path
from cogvideo.hardware import constant

COLUMNS = ("place", "sprite", "step", "mirrored", "turn", "x", "y", "size", "foot", "stands")


def views(scene: Scene, times: Sequence[float] | np.ndarray) -> np.ndarray:
    """What the frames at `times` (seconds, 0..4) show: float64 [F, len(COLUMNS)]."""
    times = np.asarray(times, np.float64)
    x, y, size, turn, foot = path(scene, times)
    sprite = find(scene.sprite)
    rows = np.empty((len(times), len(COLUMNS)))
    rows[:, 0] = PLACES.index(scene.place) * LOOKS + scene.look
    rows[:, 1] = sprite["rank"]
    rows[:, 2] = (np.floor(times * FPS + 1e-6) + scene.phase) % LOOP
    rows[:, 3] = {"left": -1, "right": 1}.get(sprite["facing"], scene.handed) != scene.handed
    rows[:, 4:9] = np.stack((turn, x, y, size, foot), 1)
    rows[:, 9] = scene.stands
    return rows


class Canvas:
    """Draws views as frames of `size` pixels a side."""

    def __init__(self, size: int, device: torch.device | str = "cpu", processes: int = 1):
        """Draw all places, which takes a second or two per thousand, in `processes` processes."""
        self.size = size
        self.device = torch.device(device)
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
        drawn = np.empty((len(rows), 3, self.size, self.size), np.float16)
        if processes == 1:
            for k, row in enumerate(rows):
                drawn[k] = _place(row)
            return torch.from_numpy(drawn)
        with ProcessPoolExecutor(processes) as pool:
            for k, one in enumerate(pool.map(_place, rows, chunksize=16)):
                drawn[k] = one
        return torch.from_numpy(drawn)

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
        share = torch.zeros(len(v["x"]), cells, cells, device=self.device)
        for chosen, rgba, box in self._sprites(v):
            share[chosen] = self._lay(rgba[:, 3:], box, _of(v, chosen), cells)[:, 0] / 255
        return share

    @torch.no_grad()
    def both(self, rows: Tensor, cells: int) -> tuple[Tensor, Tensor]:
        """Frames and cover of views on the device, by the same operations for all views, so that a CUDA graph
        can hold them. All sprites are rotated, by `grid_sample`; their edges differ by some levels.
        """
        v = self._read(rows)
        rgba, box = self._loops(v)
        box = box + MARGIN
        rgba = _rotate_fast(F.pad(rgba, (MARGIN,) * 4), box, v["turn"])
        frames = _over(self._ground(v), self._lay(rgba, box, v, self.size))
        return _rounded(frames), self._lay(rgba[:, 3:], box, v, cells)[:, 0] / 255

    def _read(self, rows: np.ndarray | Tensor) -> dict[str, Tensor]:
        columns = torch.as_tensor(rows).to(self.device, torch.float32, non_blocking=True).unbind(1)
        return dict(zip(COLUMNS, columns, strict=True))

    def _ground(self, v: dict[str, Tensor]) -> Tensor:
        """Places with the shadows of the objects that stand there."""
        frames = self.places[v["place"].long()].float()
        self._shade(frames, v)
        return frames

    def _shade(self, frames: Tensor, v: dict[str, Tensor]) -> None:
        """The soft shadow of an object that stands, or foam at sea; fainter under a hop."""
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
        """The sprites that are not rotated, then the others: indices [K], RGBA [K, 4, n, n], boxes [K, 4]."""
        for rotated in (False, True):
            chosen = ((v["turn"] != 0) == rotated).nonzero().squeeze(1)
            if not len(chosen):
                continue
            rgba, box = self._loops(_of(v, chosen))
            if rotated:
                box = box + MARGIN
                rgba = _rotate(F.pad(rgba, (MARGIN,) * 4), box, v["turn"][chosen])
            yield chosen, rgba, box

    def _loops(self, v: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The frames of the sprites' loops, mirrored if they face the wrong way: RGBA [K, 4, n, n], boxes
        [K, 4]."""
        number = self.ranks[v["sprite"].long()]
        rgba = self.loops[number, v["step"].long()].float()
        left, top, right, bottom = self.boxes[number].unbind(1)
        mirrored = v["mirrored"] > 0
        rgba = torch.where(mirrored[:, None, None, None], rgba.flip(3), rgba)
        width = rgba.shape[-1]
        new_left = torch.where(mirrored, width - right, left)
        new_right = torch.where(mirrored, width - left, right)
        return rgba, torch.stack((new_left, top, new_right, bottom), 1)

    def _lay(self, rgba: Tensor, box: Tensor, v: dict[str, Tensor], size: int) -> Tensor:
        """Sprites [K, C, n, n] where they belong in a frame of `size`: [K, C, size, size]."""
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
    """Weights [K, size, count]: each pixel's mean over `count` samples, interpolated linearly."""
    origin = centre * size - middle * scale
    edges = (torch.arange(size + 1, device=scale.device) - origin[:, None]) / scale[:, None]  # [K, size + 1]
    u = (edges[:, :, None] - torch.arange(count, device=scale.device) - 0.5).clamp(-1, 1)
    area = torch.where(u < 0, (1 + u) ** 2, 2 - (1 - u) ** 2) / 2
    return area.diff(dim=1) / edges.diff(dim=1)[:, :, None]


def _rotate(rgba: Tensor, box: Tensor, degrees: Tensor) -> Tensor:
    """Images [K, C, n, n] rotated clockwise about the centres of their boxes [K, 4], as Pillow's bicubic
    `rotate` does."""
    n = rgba.shape[-1]
    angle = degrees.deg2rad()[:, None, None]
    cx = (box[:, 0] + box[:, 2])[:, None, None] / 2
    cy = (box[:, 1] + box[:, 3])[:, None, None] / 2
    at = torch.arange(n, device=rgba.device) + 0.5
    dx = at[None, None, :] - cx
    dy = at[None, :, None] - cy
    x = angle.cos() * dx + angle.sin() * dy + cx - 0.5  # [K, n, n]
    y = -angle.sin() * dx + angle.cos() * dy + cy - 0.5
    inside = (x > -0.5) & (x < n - 0.5) & (y > -0.5) & (y < n - 0.5)

    flat = rgba.flatten(2)
    rotated = torch.zeros_like(rgba)
    for row, down in enumerate(_cubic(y - y.floor())):
        for column, along in enumerate(_cubic(x - x.floor())):
            yy = (y.floor().long() + row - 1).clamp(0, n - 1)
            xx = (x.floor().long() + column - 1).clamp(0, n - 1)
            index = (yy * n + xx).flatten(1)[:, None].expand(-1, flat.shape[1], -1)
            rotated += flat.gather(2, index).view_as(rgba) * (down * along)[:, None]
    return (rotated * inside[:, None]).clamp(0, 255).floor()


def _rotate_fast(rgba: Tensor, box: Tensor, degrees: Tensor) -> Tensor:
    """`_rotate` by a single operation, whose cubic interpolation is slightly softer."""
    n = rgba.shape[-1]
    angle = degrees.deg2rad()
    cosine = angle.cos()
    sine = angle.sin()
    cx = (box[:, 0] + box[:, 2]) / n - 1  # -1..1, the coordinates of `grid_sample`
    cy = (box[:, 1] + box[:, 3]) / n - 1
    shift_x = cx - cosine * cx - sine * cy
    shift_y = cy + sine * cx - cosine * cy
    moves = torch.stack((cosine, sine, shift_x, -sine, cosine, shift_y), 1).view(-1, 2, 3)
    grid = F.affine_grid(moves, list(rgba.shape), align_corners=False)
    return F.grid_sample(rgba, grid, mode="bicubic", align_corners=False).clamp(0, 255)


def _cubic(d: Tensor) -> tuple[Tensor, ...]:
    """Weights of four neighbours of a point that is `d` past the second."""
    return (-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, -(d**2) + d**3)

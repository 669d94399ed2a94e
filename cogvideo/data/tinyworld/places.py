"""Where a scene happens, at any size and in `LOOKS` variations: ten places, drawn with soft shapes, and the
backgrounds of users' worlds."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from cogvideo.data.tinyworld.own import world_of
from cogvideo.video import open_image

# sky at the top and at the horizon, land far and near, one accent; a look is between the two rows
_COLOURS = {
    "field": ("63b1f0 cdeafc 9bd583 6dbb5c ffffff", "93cdea fdeecb c3dd77 9cc654 fffaf0"),
    "desert": ("79c4ee dcf0f6 f3d8a3 e3b873 5f9e5b", "f2b583 fbe6c2 ebbd80 d0955c 6b8f4a"),
    "snow": ("8fbbe4 dcebf8 f2f8fe c9dcf0 7f9cc0", "b3a9de ebe2f5 f3f0fd cfcfea 8f86b8"),
    "city": ("9cc4ea e0eaf3 8fa0c0 6b7284 fff0b8", "f0bfa6 fce8d8 b48fa4 746a7c ffe6a0"),
    "forest": ("bfe6cf e6f4d8 57a468 3f8750 2f6b46", "dfe3a6 f4efce 8ea552 6d8540 566b34"),
    "sea": ("86c7f3 e2f4fc 4aa6dd 1f6db3 ffffff", "b7dde8 f8f0d8 43b9ba 1d858f fffbe6"),
    "underwater": ("49b5d3 0f4f8c d8c48c b29a64 bff0ff", "4cc2ae 0b5f6b cfc796 a39a66 c8fff0"),
    "night sky": ("0b1440 34428a 151c40 10152f fff6d0", "1b0f45 573a8c 1d1438 150f2b ffeac8"),
    "sunset": ("5c4196 fba65a 47355f 33264a fff0a8", "b5446f ffcf7a 5c2f4c 43213a ffe9b0"),
    "space": ("05081a 15173f 7f9fe0 3f5fae ffffff", "120724 2c1248 e0937f a84f6a fff4e0"),
}
PLACES = tuple(_COLOURS)
LAND = ("field", "desert", "snow", "city", "forest", "sunset")  # places where things stand on the ground
LOOKS = 256  # variations of a place


def is_land(place: str) -> bool:
    """Whether things stand on the ground there."""
    world = world_of(place)
    return place in LAND if world is None else world.backgrounds[place].ground


@lru_cache(32)
def draw_place(place: str, look: int, size: int) -> np.ndarray:
    """An empty place, float32 [size, size, 3] in 0..255; `look` decides colours and where things stand."""
    world = world_of(place)
    if world is None:
        image = _draw(place, look, size)
    else:
        image = _vary(world.folder / world.backgrounds[place].file, look, size)
    image.flags.writeable = False  # it is cached
    return image


@lru_cache(64)
def _background(file: Path) -> Image.Image:
    with open_image(file) as image:
        return image.convert("RGB")


def _vary(file: Path, look: int, size: int) -> np.ndarray:
    """A background: most of it, mirrored or not, a little lighter or darker."""
    image = _background(file)
    rng = np.random.default_rng(look)
    side = min(image.size) * rng.uniform(0.8, 1.0)
    left = rng.uniform(0, image.width - side)
    top = rng.uniform(0, image.height - side)
    part = image.resize((size, size), Image.Resampling.BOX, (left, top, left + side, top + side))
    pixels: np.ndarray = np.asarray(part, np.float32) * np.float32(rng.uniform(0.92, 1.04))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels.clip(max=255)


def _draw(place: str, look: int, size: int) -> np.ndarray:
    rng = np.random.default_rng((PLACES.index(place), look))
    first, second = (_palette(row) for row in _COLOURS[place])
    colours = first + (second - first) * np.float32((0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1)[look % 8])
    horizon = rng.uniform(0.36, 0.44) if place == "sea" else rng.uniform(0.52, 0.60)
    sky = 1.0 if place in ("underwater", "night sky", "space") else horizon  # how far down it reaches

    fine = max(1, -(-96 // size))  # a small image is drawn larger and averaged
    brush = _Brush(size * fine, colours, horizon, sky)
    _SCENERY[place](brush, rng)
    image: np.ndarray = brush.image.reshape(size, fine, size, fine, 3).mean((1, 3))
    return image


def _palette(row: str) -> np.ndarray:
    """The colours [5, 3] of a row of `_COLOURS`."""
    return np.stack([_rgb(*bytes.fromhex(colour)) for colour in row.split()])


def _rgb(*levels: int) -> np.ndarray:
    return np.array(levels, np.float32)


class _Brush:
    """Draws soft shapes on an image, float32 [S, S, 3]; coordinates are fractions of the frame."""

    def __init__(self, size: int, colours: np.ndarray, horizon: float, sky: float):
        top, low, self.far, self.near, self.accent = colours
        self.size = size
        self.horizon = horizon
        self.x = ((np.arange(size, dtype=np.float32) + 0.5) / size)[None, :]
        self.y = self.x.T
        ramp = np.clip(self.y / sky, 0, 1)[..., None]
        self.image = np.broadcast_to(top + (low - top) * ramp, (size, size, 3)).astype(np.float32)

    def paint(self, distance: np.ndarray, colour: np.ndarray, amount: float = 1.0, soft: float = 0.0) -> None:
        """Paint where `distance` to the edge, positive inside, allows; `soft` widens the edge."""
        cover = np.clip(0.5 + distance / max(1 / self.size, soft), 0, 1) * amount
        self.image += (colour - self.image) * cover[..., None]

    def disc(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        colour: np.ndarray,
        amount: float = 1.0,
        soft: float = 0.0,
    ) -> None:
        r = np.sqrt(((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2)
        self.paint((1 - r) * min(rx, ry), colour, amount, soft)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: np.ndarray) -> None:
        across = np.minimum(self.x - x0, x1 - self.x)
        along = np.minimum(self.y - y0, y1 - self.y)
        self.paint(np.minimum(across, along), colour)

    def land(
        self, level: float, height: float, waves: float, shift: float, far: np.ndarray, near: np.ndarray
    ) -> None:
        """Paint all below a wavy line, from `far` at the line to `near` at the bottom."""
        line = level - height * np.sin(waves * self.x * 2 * np.pi + shift)
        ramp = np.clip((self.y - level) / (1 - level), 0, 1)[..., None]
        self.paint(self.y - line, far + (near - far) * ramp)

    def clouds(self, rng: np.random.Generator) -> None:
        for i in range(2):
            x = (i + rng.uniform(0.1, 0.9)) / 2
            y = rng.uniform(0.08, 0.24)
            r = rng.uniform(0.045, 0.065)
            for dx, dy, part in ((-1.3, 0.25, 0.8), (0, 0, 1.15), (1.3, 0.3, 0.75)):
                self.disc(x + dx * r, y + dy * r, 1.3 * r * part, r * part, self.accent, 0.75)

    def stars(self, rng: np.random.Generator, count: int, lowest: float) -> None:
        for i in range(count):
            x = (i % 4 + rng.uniform(0.1, 0.9)) / 4
            y = rng.uniform(0.03, 0.97)
            r = rng.uniform(0.010, 0.016)
            self.disc(x, lowest * y, r, r, self.accent, rng.uniform(0.6, 1.0))


# -- one function a place; the order of the random numbers decides the looks --


def _field(b: _Brush, rng: np.random.Generator) -> None:
    shift = rng.uniform(0, 6.28)
    b.clouds(rng)
    b.land(b.horizon - 0.05, 0.05, rng.uniform(0.8, 1.3), shift, b.far * 0.88, b.far * 0.88)
    b.land(b.horizon + 0.05, 0.025, rng.uniform(0.5, 0.9), shift + 2, b.far, b.near)


def _desert(b: _Brush, rng: np.random.Generator) -> None:
    shift = rng.uniform(0, 6.28)
    x = rng.uniform(0.12, 0.88)
    y = rng.uniform(0.12, 0.2)
    b.disc(x, y, 0.085, 0.085, _rgb(255, 244, 205), soft=0.03)
    b.land(b.horizon - 0.02, 0.07, rng.uniform(0.7, 1.1), shift, b.far * 0.93, b.far * 0.93)
    b.land(b.horizon + 0.07, 0.04, rng.uniform(0.5, 0.8), shift + 2.5, b.far, b.near)
    x = rng.choice((0.1, 0.9)) + rng.uniform(-0.04, 0.04)  # a cactus
    for dx, top, foot in ((0, -0.16, 0.08), (-0.055, -0.07, -0.01), (0.055, -0.1, -0.03)):
        b.disc(x + dx, b.horizon + (top + foot) / 2, 0.022, (foot - top) / 2, b.accent)
    b.box(x - 0.055, b.horizon - 0.035, x + 0.055, b.horizon - 0.005, b.accent)


def _snow(b: _Brush, rng: np.random.Generator) -> None:
    shift = rng.uniform(0, 6.28)
    for i in range(3):  # mountains, and their white tips
        x = (i + rng.uniform(0.2, 0.8)) / 3
        peak = b.horizon - rng.uniform(0.18, 0.32)
        slope = b.y - peak - 0.95 * np.abs(b.x - x)
        b.paint(slope, b.accent)
        b.paint(np.minimum(slope, peak + 0.09 - b.y), _rgb(248, 251, 255))
    b.land(b.horizon, 0.025, rng.uniform(0.6, 1.1), shift, b.far, b.near)


def _city(b: _Brush, rng: np.random.Generator) -> None:
    rng.random()  # unused, but the looks of the city depend on it
    edge = -rng.uniform(0.0, 0.1)
    while edge < 1:
        wide = rng.uniform(0.15, 0.22)
        tall = rng.uniform(0.2, 0.42)
        b.box(edge, b.horizon + 0.1 - tall, edge + wide, b.horizon + 0.12, b.far * rng.uniform(0.86, 1.12))
        for row in range(int(tall / 0.11)):
            for part in (0.28, 0.72):
                x = edge + part * wide
                y = b.horizon + 0.05 - tall + 0.06 + 0.1 * row
                b.box(x - 0.022, y - 0.025, x + 0.022, y + 0.025, b.accent)
        edge += wide + rng.uniform(0.0, 0.04)
    b.land(b.horizon + 0.1, 0, 1, 0, b.near * 1.25, b.near * 1.25)
    b.land(b.horizon + 0.16, 0, 1, 0, b.near, b.near)
    for i in range(4):  # the line along the road
        b.box(0.04 + 0.27 * i, 0.95, 0.16 + 0.27 * i, 0.97, b.near * 1.7)


def _forest(b: _Brush, rng: np.random.Generator) -> None:
    shift = rng.uniform(0, 6.28)
    far = b.accent * 0.5 + b.far * 0.5 + 20
    trunk = _rgb(112, 84, 66)
    for count, top, bark, leaves in ((6, 0.3, trunk + 30, far), (4, 0.2, trunk, b.accent)):
        for i in range(count):
            x = (i + rng.uniform(0.2, 0.8)) / count
            y = b.horizon - top + rng.uniform(-0.05, 0.05)
            b.box(x - 0.02, y, x + 0.02, b.horizon + 0.1, bark)
            r = rng.uniform(0.12, 0.15)
            b.disc(x, y - 0.02, r, r * 1.25, leaves)
    b.land(b.horizon + 0.06, 0.02, rng.uniform(0.6, 1.0), shift, b.far * 1.15, b.near * 1.2)


def _sea(b: _Brush, rng: np.random.Generator) -> None:
    b.clouds(rng)
    b.land(b.horizon, 0.004, 1, rng.uniform(0, 6.28), b.far, b.near)
    for i in range(5):  # crests
        x = rng.uniform(0.05, 0.95)
        y = b.horizon + 0.08 + 0.1 * i
        b.disc(x, y, 0.10 + 0.012 * i, 0.010 + 0.002 * i, b.accent, 0.4, 0.01)


def _underwater(b: _Brush, rng: np.random.Generator) -> None:
    for _ in range(3):  # rays of light
        x = rng.uniform(0, 1)
        lean = rng.uniform(0.1, 0.35)
        distance = 0.05 + 0.05 * b.y - np.abs(b.x - x - lean * (b.y - 0.3))
        b.paint(np.minimum(distance, 0.62 - 1.0 * b.y), b.accent, 0.16, 0.06)
    b.land(rng.uniform(0.84, 0.88), 0.02, rng.uniform(0.7, 1.2), rng.uniform(0, 6.28), b.far, b.near)
    for _ in range(3):  # weeds
        x = rng.choice((0.06, 0.94)) + rng.uniform(-0.06, 0.06)
        tall = rng.uniform(0.14, 0.28)
        bend = 0.02 * np.sin(b.y * 25 + 6 * x)
        stem = np.minimum(0.020 - np.abs(b.x - x - bend), b.y - 0.93 + tall)
        b.paint(stem, _rgb(38, 128, 92))
    for _ in range(4):  # bubbles
        r = rng.uniform(0.014, 0.024)
        b.disc(rng.uniform(0.05, 0.95), rng.uniform(0.06, 0.7), r, r, b.accent, 0.6)


def _night_sky(b: _Brush, rng: np.random.Generator) -> None:
    b.stars(rng, 12, lowest=0.75)
    x = 0.5 + 0.85 * (rng.choice((0.08, 0.92)) - 0.5)  # a crescent
    y = rng.uniform(0.13, 0.2)
    moon = 0.085 - np.sqrt((b.x - x) ** 2 + (b.y - y) ** 2)
    bite = np.sqrt((b.x - x - 0.045) ** 2 + (b.y - y + 0.02) ** 2) - 0.075
    b.paint(np.minimum(moon, bite), b.accent)
    b.land(0.90, 0.035, rng.uniform(0.8, 1.4), rng.uniform(0, 6.28), b.far, b.near)


def _sunset(b: _Brush, rng: np.random.Generator) -> None:
    x = rng.uniform(0.2, 0.8)
    b.disc(x, b.horizon - 0.08, 0.32, 0.32, b.accent, 0.35, 0.3)
    b.disc(x, b.horizon - 0.08, 0.15, 0.15, b.accent)
    b.land(b.horizon - 0.02, 0.035, rng.uniform(0.7, 1.2), rng.uniform(0, 6.28), b.far * 1.25, b.far * 1.25)
    b.land(b.horizon + 0.06, 0.02, rng.uniform(0.5, 0.9), rng.uniform(0, 6.28), b.far, b.near)


def _space(b: _Brush, rng: np.random.Generator) -> None:
    for colour in (b.far, b.near):  # glows
        b.disc(rng.uniform(0, 1), rng.uniform(0, 1), 0.5, 0.35, colour, 0.22, 0.35)
    b.stars(rng, 14, lowest=1)
    x = rng.choice((0.08, 0.92))
    y = rng.choice((0.06, 0.94))
    r = rng.uniform(0.16, 0.24)
    b.disc(x, y, r, r, b.near)  # a planet looks in at a corner
    b.disc(x - 0.2 * r, y - 0.2 * r, 0.72 * r, 0.72 * r, b.far, 0.7, 0.1)


_SCENERY = {
    "field": _field,
    "desert": _desert,
    "snow": _snow,
    "city": _city,
    "forest": _forest,
    "sea": _sea,
    "underwater": _underwater,
    "night sky": _night_sky,
    "sunset": _sunset,
    "space": _space,
}

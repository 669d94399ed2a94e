"""Where each token stands: the one place that knows frame order, positions, masks and which frames are
trained.

A stage is a layout, not a class. The sequence is `text_len` text tokens, then the frames of `order`, each
`grid * grid` tokens in raster order. `given` frames are known beforehand and see one another in both
directions.

    image     Layout.image(text_len, grid)      order 0             the first picture alone
    stage 1   Layout.keyframes(...)             order 0 1 2 3 4     key frames, each after the one before
    stage 2   Layout.interpolation(...)         order 0 2 4 1 3     0 2 4 are given, 1 and 3 are filled in

One rule makes every mask. In laid order, a frame token i

    sees(i, j) = (j <= i  or  both in given frames)  and  near(i, j)

where near is the same frame (spatial channel), the same tile of any frame (temporal channel with windows) or
anything (temporal channel with full attention). Text sees text, in both directions; every frame token sees
all text; padding is seen by none. Stage 2 on a 1 x 1 grid, `#` sees:

         text 0 2 4 1 3
    text  #   . . . . .
    0     #   # # # . .
    2     #   # # # . .
    4     #   # # # . .
    1     #   # # # # .
    3     #   # # # # #

What enters the model: slot 0 of each frame holds the start-of-image token and slot k token k - 1 of the
frame, so the output at slot k predicts token k and the last token of a frame enters nowhere (SPEC: CogVideo
section 3, "B.1, B.2").

Diagonals: with a `skew` the codes of a frame are not predicted one after another but in steps, a diagonal at
a time: column c of row r belongs to step c + skew * r. A code then sees all earlier steps of its frame and
its own, and its slot holds the code to its left (in the first column the one above). With a skew of 2 the
neighbours to the left and the three above are known, and a frame of 16 x 16 takes 46 steps instead of 256.

Tiles: the map is cut into `window` x `window` tiles; a shifted layer moves the cuts by half a window, which
leaves half tiles at the border. For computing, tokens are gathered into groups of one size (the shifted map
is rolled, so that border tiles share a group, kept apart by the mask); for stepping, each tile's tokens lie
side by side, in laid order.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

SECONDS = 4.0  # that the key frames span


def rounds(frames: int) -> dict[int, float]:
    """How many frames a clip has and their rate: key frames, then after each of three rounds of interpolation
    (CogVideo section 3.1)."""
    return {(frames - 1) * 2**n + 1: (frames - 1) * 2**n / SECONDS for n in range(4)}


@dataclass(frozen=True)
class Segments:
    """Where a cache keeps each laid place, as lists by place: a token sees slots start .. end - 1 and lies at
    `slot` itself."""

    start: list[int]
    slot: list[int]
    end: list[int]


@dataclass(frozen=True)
class Layout:
    text_len: int
    grid: int  # tokens a side of one frame
    frames: int = 1
    order: tuple[int, ...] = (0,)  # frames, by their place in time, as they are laid
    given: tuple[int, ...] = ()  # known frames that see each other; laid first
    skew: int = 0  # columns by which each row of codes is behind the one above; 0: one code after another
    reference: bool = False  # the prompt as in the original's inference: given frames see around the border

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(self.frames)):
            raise ValueError(f"order {self.order} is not an order of {self.frames} frames")
        if tuple(self.order[: len(self.given)]) != tuple(self.given):
            raise ValueError(f"given frames {self.given} must be laid first, in the order {self.order}")

    @classmethod
    def image(cls, text_len: int, grid: int, skew: int = 0) -> "Layout":
        return cls(text_len, grid, skew=skew)

    @classmethod
    def keyframes(cls, text_len: int, grid: int, frames: int, skew: int = 0) -> "Layout":
        return cls(text_len, grid, frames, tuple(range(frames)), skew=skew)

    @classmethod
    def interpolation(cls, text_len: int, grid: int, frames: int, skew: int = 0) -> "Layout":
        given = tuple(range(0, frames, 2))
        return cls(text_len, grid, frames, given + tuple(range(1, frames, 2)), given, skew)

    def first(self, count: int) -> "Layout":
        """The first `count` laid frames alone, renumbered: the same masks, cut off."""
        order = tuple(range(count))
        return replace(self, frames=count, order=order, given=order[: len(self.given)])

    @property
    def frame_len(self) -> int:
        return self.grid * self.grid

    @property
    def tokens(self) -> int:
        """Frame tokens of the whole sequence."""
        return self.frames * self.frame_len

    @property
    def trained(self) -> tuple[int, ...]:
        """The frames a model is trained to predict: not the given ones, nor the first of several (the image
        model's)."""
        known = self.given or self.order[: min(1, self.frames - 1)]
        return tuple(f for f in self.order if f not in known)

    # -- steps of one frame

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """[N] the step of its frame in which each place of the map is predicted."""
        if not self.skew:
            return tuple(range(self.frame_len))
        return tuple(column + self.skew * row for row in range(self.grid) for column in range(self.grid))

    @property
    def length(self) -> int:
        """Steps of one frame."""
        return self.steps[-1] + 1

    @cached_property
    def before(self) -> tuple[int, ...]:
        """[N] the place of the map whose code enters at each place; -1: start-of-image enters."""
        if not self.skew:
            return tuple(range(-1, self.frame_len - 1))
        return (-1, *(k - 1 if k % self.grid else k - self.grid for k in range(1, self.frame_len)))

    def entering(self, places: Sequence[int]) -> list[int]:
        """The laid places whose codes enter at some laid places; -1: start-of-image enters."""
        rasters = [self.before[place % self.frame_len] for place in places]
        return [-1 if at < 0 else place - place % self.frame_len + at for place, at in zip(places, rasters)]

    # -- packing

    def lay(self, frames: Tensor) -> Tensor:
        """[B, F, ...] in time order to laid order."""
        return torch.stack([frames[:, frame] for frame in self.order], 1)

    def unlay(self, frames: Tensor) -> Tensor:
        """[B, F, ...] in laid order to time order."""
        return torch.stack([frames[:, self.order.index(frame)] for frame in range(self.frames)], 1)

    def inputs(self, codes: Tensor, start: int) -> Tensor:
        """Codes [B, f, N] of the first f laid frames to what enters the model [B, f * N]; `start` is the
        start-of-image id."""
        codes = torch.cat((torch.full_like(codes[..., :1], start), codes), -1)
        return codes[..., self._entering(codes.device)].flatten(1)

    @lru_cache(maxsize=32)
    def _entering(self, device: torch.device) -> Tensor:
        """[N] what enters at each place of a map, of start-of-image and its codes."""
        with torch.inference_mode(False):
            return torch.tensor(self.before, device=device) + 1

    @lru_cache(maxsize=32)
    def loss_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """[F * N] in laid order, 1 where the output is trained."""
        with torch.inference_mode(False):  # kept, and so must serve training too
            per_frame = torch.tensor([float(f in self.trained) for f in self.order], device=device)
            return per_frame.repeat_interleave(self.frame_len)

    @lru_cache(maxsize=32)
    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """[F * N] in laid order: place in time and raster, counted from the first token of frame 0."""
        with torch.inference_mode(False):
            frame = torch.tensor(self.order, device=device).repeat_interleave(self.frame_len)
            return frame * self.frame_len + torch.arange(self.frame_len, device=device).repeat(self.frames)

    @lru_cache(maxsize=32)
    def axes(self, device: torch.device | str = "cpu") -> Tensor:
        """[F * N, 3] in laid order: time (in frames), row and column of each place."""
        with torch.inference_mode(False):
            raster = self.positions(device) % self.frame_len
            time = self.positions(device) // self.frame_len
            return torch.stack((time, raster // self.grid, raster % self.grid), 1)

    # -- who sees whom

    def tiles(self, window: int, shifted: bool, rolled: bool = False) -> Tensor:
        """[N] the tile of each place of the map; one tile of everything if window is 0. On a rolled map the
        half tiles of opposite borders are one."""
        if window == 0:
            return torch.zeros(self.frame_len, dtype=torch.long)
        if self.grid % window:
            raise ValueError(f"windows of {window} do not divide a grid of {self.grid}")
        band = (torch.arange(self.grid) + (window - window // 2 if shifted else 0)) // window
        if rolled:
            band %= self.grid // window
        return (band[:, None] * self.grid + band[None, :]).flatten()

    def sees(self, channel: str, window: int = 0, shifted: bool = False) -> Tensor:
        """Bool [F * N, F * N]: row sees column, in laid order. `channel` is "spatial" or "temporal"."""
        place = torch.arange(self.tokens)
        frame, raster = place // self.frame_len, place % self.frame_len
        turn = frame * self.length + torch.tensor(self.steps)[raster]  # when a place is predicted
        given = frame < len(self.given)
        both = given[:, None] & given[None, :]
        tile = frame if channel == "spatial" else self.tiles(window, shifted)[raster]
        near = tile[:, None] == tile[None, :]
        if self.reference and channel == "temporal":
            tile = self.tiles(window, shifted, rolled=True)[raster]
            near |= both & (tile[:, None] == tile[None, :])
        return ((turn[None, :] <= turn[:, None]) | both) & near

    def groups(self, channel: str, window: int = 0, shifted: bool = False) -> Tensor:
        """[G, n] laid places that attend together (before the mask): frames, rolled windows, or
        everything."""
        places = torch.arange(self.tokens).view(self.frames, self.grid, self.grid)
        if channel == "spatial":
            return places.flatten(1)
        if window == 0:
            return places.view(1, -1)
        if shifted:
            places = places.roll((-(window // 2), -(window // 2)), (1, 2))
        cut = places.unfold(1, window, window).unfold(2, window, window)  # [F, rows, columns, w, w]
        return cut.permute(1, 2, 0, 3, 4).reshape(-1, self.frames * window * window)

    @lru_cache(maxsize=32)
    def segments(self, channel: str, window: int = 0, shifted: bool = False) -> "Segments":
        """Where keys lie in a cache so that what a token sees is one slice.

        Each tile has a segment: the text, then its tokens, frame after frame, in the order of their steps.
        The spatial channel has a segment for each frame that is under way at one time, used again and again.
        """
        size, text_len = self.frame_len, self.text_len
        if channel == "spatial":
            lanes = min(-(-self.length // self.lag(window)), max(1, self.frames - len(self.given)))
            tiles = [range(frame * size, (frame + 1) * size) for frame in range(self.frames)]
            starts = [frame % lanes * (text_len + size) for frame in range(self.frames)]
        else:
            tile = self.tiles(window, shifted).repeat(self.frames)
            tiles = [(tile == one).nonzero().flatten().tolist() for one in tile.unique().tolist()]
            starts = [0, *accumulate(text_len + len(members) for members in tiles)]

        def turn(place: int) -> tuple[int, int]:
            return place // size, self.steps[place % size]

        found = Segments(*([0] * self.tokens for _ in range(3)))
        for start, members in zip(starts, tiles):
            turns = sorted(map(turn, members))
            for rank, place in enumerate(sorted(members, key=turn)):
                found.start[place] = start
                found.slot[place] = start + text_len + rank
                found.end[place] = start + text_len + bisect_right(turns, turn(place))
        return found

    # -- which tokens can be made at the same time

    @lru_cache(maxsize=32)
    def lag(self, window: int) -> int:
        """Steps by which a frame must be behind the frame laid before it, to be made at the same time.

        Token j of a frame needs the tokens of its tiles in the frame before, of both cuts, to be there. With
        full attention that is the whole frame (CogVideo section 3.3.2: parallel generation).
        """
        if window == 0:
            return self.length
        steps = torch.tensor(self.steps)
        needs = 0
        for shifted in (False, True):
            tile = self.tiles(window, shifted)
            last = torch.stack([steps[tile == one].max() for one in tile])
            needs = max(needs, int((last - steps).max()))
        return min(needs + 1, self.length)

    def waves(self, known: int, window: int) -> Iterator[list[int]]:
        """The laid places after `known` frames, those that can be made at the same time together."""
        lag, making = self.lag(window), self.frames - known
        rasters: list[list[int]] = [[] for _ in range(self.length)]  # of each step of a frame
        for raster, step in enumerate(self.steps):
            rasters[step].append(raster)
        for tick in range(self.length + (making - 1) * lag if making else 0):
            wave: list[int] = []
            for k in range(making):
                step, first = tick - k * lag, (known + k) * self.frame_len
                if 0 <= step < self.length:
                    wave += [first + raster for raster in rasters[step]]
            yield wave

    def draw(self, channel: str, window: int = 0, shifted: bool = False) -> str:
        """The mask as text: a row for each frame token, `#` where it sees, a gap between frames."""
        rows = []
        for i, row in enumerate(self.sees(channel, window, shifted).tolist()):
            marks = "".join("#" if seen else "." for seen in row)
            frames = [marks[k : k + self.frame_len] for k in range(0, len(marks), self.frame_len)]
            rows.append(" ".join(frames))
            if (i + 1) % self.frame_len == 0 and i + 1 < self.tokens:
                rows.append("")
        return "\n".join(rows)

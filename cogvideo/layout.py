"""Where each token stands: this file alone knows frame order, positions, masks and trained frames.

A stage is a layout, not a class. The sequence is `text_len` text tokens, then the frames of `order`, each
`grid * grid` tokens in raster order. `given` frames are known in advance and see one another in both
directions. (A call of generation may *know* frames that are not given: the first frame in stage 1, or those
of a video to be continued. They keep the causal mask of training.)

    image     Layout.image(text_len, grid)      order 0             the first frame alone
    stage 1   Layout.keyframes(...)             order 0 1 2 3 4     key frames, each after the previous one
    stage 2   Layout.interpolation(...)         order 0 2 4 1 3     0 2 4 are given, 1 and 3 are generated

*Laid order* is the order of the sequence. One rule gives every mask: in laid order, a frame token i

    sees(i, j) = (j <= i  or  both in given frames)  and  near(i, j)

where near is the same frame (spatial channel), the same tile of any frame (temporal channel with windows) or
anything (temporal channel with full attention). Text sees text, in both directions; every frame token sees
all text; no token sees padding. Stage 2 on a 1 x 1 grid, `#` sees:

         text 0 2 4 1 3
    text  #   . . . . .
    0     #   # # # . .
    2     #   # # # . .
    4     #   # # # . .
    1     #   # # # # .
    3     #   # # # # #

Inputs: slot 0 of each frame holds the start-of-image token and slot k holds token k - 1 of the frame, so the
output at slot k predicts token k, and the last token of a frame is never an input (CogVideo section 3;
docs/reference.md, "Layouts and masks").

Diagonals: with a `skew` the codes of a frame are predicted a diagonal at a time: column c of row r belongs to
step c + skew * r. A code then sees all earlier steps of its frame and its own step, and its slot holds the
code to its left (in the first column the one above). With a skew of 2 the neighbours to the left and the
three above are known, and a frame of 16 x 16 takes 46 steps instead of 256.

Tiles: the map is cut into `window` x `window` tiles; a shifted layer moves the cuts by half a window, which
leaves half tiles at the border. A full pass gathers tokens into groups of equal size: it rolls the shifted
map, so that border tiles share a group, and the mask keeps them apart. For generation, a cache stores each
tile's tokens next to each other, in laid order.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SECONDS = 4.0  # from the first key frame to the last


def rounds(frames: int) -> dict[int, float]:
    """Frames of a clip -> their fps: of `frames` key frames, then after each of three rounds of interpolation
    (CogVideo section 3.1)."""
    return {(frames - 1) * 2**n + 1: (frames - 1) * 2**n / SECONDS for n in range(4)}


@dataclass(frozen=True)
class Segments:
    """Where a cache keeps each laid position, as lists by position: a token is stored at `slot` and sees the
    slots start .. end - 1."""

    start: list[int]
    slot: list[int]
    end: list[int]


@dataclass(frozen=True)
class Layout:
    text_len: int
    grid: int  # tokens a side of one frame
    frames: int = 1
    order: tuple[int, ...] = (0,)  # frames, numbered in time, in laid order
    given: tuple[int, ...] = ()  # known frames that see each other; laid first
    skew: int = 0  # columns by which each row of codes lags behind the row above; 0: one code after another
    reference: bool = False  # as in the original's inference: given frames see across the border of the map

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
        """The first `count` laid frames alone, renumbered: the top left corner of the same masks."""
        order = tuple(range(count))
        return replace(self, frames=count, order=order, given=order[: len(self.given)])

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame."""
        return self.grid * self.grid

    @property
    def clip_tokens(self) -> int:
        """Tokens of all frames."""
        return self.frames * self.frame_tokens

    @property
    def trained(self) -> tuple[int, ...]:
        """The frames a model is trained to predict: not the given ones, nor the first of several (the image
        model's)."""
        known = self.given or self.order[: min(1, self.frames - 1)]
        return tuple(f for f in self.order if f not in known)

    # -- steps of one frame

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """[N] the step of its frame in which each position of the map is predicted."""
        if not self.skew:
            return tuple(range(self.frame_tokens))
        return tuple(column + self.skew * row for row in range(self.grid) for column in range(self.grid))

    @property
    def frame_steps(self) -> int:
        """Steps of one frame."""
        return self.steps[-1] + 1

    @cached_property
    def before(self) -> tuple[int, ...]:
        """[N] the position of the map whose code is the input at each position; -1: start-of-image."""
        if not self.skew:
            return tuple(range(-1, self.frame_tokens - 1))
        return (-1, *(k - 1 if k % self.grid else k - self.grid for k in range(1, self.frame_tokens)))

    def entering(self, positions: Sequence[int]) -> list[int]:
        """The laid positions whose codes are the inputs at laid `positions`; -1: start-of-image."""
        sources = []
        for position in positions:
            raster = position % self.frame_tokens
            source = self.before[raster]
            sources.append(-1 if source < 0 else position - raster + source)
        return sources

    # -- packing

    def lay(self, frames: Tensor) -> Tensor:
        """[B, F, ...] in time order to laid order."""
        return torch.stack([frames[:, frame] for frame in self.order], 1)

    def unlay(self, frames: Tensor) -> Tensor:
        """[B, F, ...] in laid order to time order."""
        return torch.stack([frames[:, self.order.index(frame)] for frame in range(self.frames)], 1)

    def inputs(self, codes: Tensor, start: int) -> Tensor:
        """Codes [B, f, N] of the first f laid frames to the model's inputs [B, f * N]; `start` is the
        start-of-image id."""
        codes = torch.cat((torch.full_like(codes[..., :1], start), codes), -1)
        return codes[..., self._entering(codes.device)].flatten(1)

    @lru_cache(maxsize=32)
    def _entering(self, device: torch.device) -> Tensor:
        """[N] the input at each position of a map, as an index into start-of-image and the map's codes."""
        with torch.inference_mode(False):
            return torch.tensor(self.before, device=device) + 1

    @lru_cache(maxsize=32)
    def loss_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """[F * N] in laid order, 1 where the output is trained."""
        with torch.inference_mode(False):  # cached: training must not meet an inference tensor
            per_frame = torch.tensor([float(f in self.trained) for f in self.order], device=device)
            return per_frame.repeat_interleave(self.frame_tokens)

    @lru_cache(maxsize=32)
    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """[F * N] in laid order: the position in time and raster order, 0 at the first token of frame 0."""
        with torch.inference_mode(False):
            frame = torch.tensor(self.order, device=device).repeat_interleave(self.frame_tokens)
            raster = torch.arange(self.frame_tokens, device=device).repeat(self.frames)
            return frame * self.frame_tokens + raster

    @lru_cache(maxsize=32)
    def axes(self, device: torch.device | str = "cpu") -> Tensor:
        """[F * N, 3] in laid order: time (in frames), row and column of each position."""
        with torch.inference_mode(False):
            raster = self.positions(device) % self.frame_tokens
            time = self.positions(device) // self.frame_tokens
            return torch.stack((time, raster // self.grid, raster % self.grid), 1)

    def axes_at(self, corners: Tensor) -> Tensor:
        """[B, F * N, 3]: `axes` of crops of larger frames, whose first rows and columns are corners
        [B, 2]."""
        return self.axes(corners.device) + F.pad(corners, (1, 0))[:, None]

    # -- who sees whom

    def tiles(self, window: int, shifted: bool, rolled: bool = False) -> Tensor:
        """[N] the tile of each position of the map; a single tile if window is 0. On a rolled map the half
        tiles of opposite borders are one."""
        if window == 0:
            return torch.zeros(self.frame_tokens, dtype=torch.long)
        if self.grid % window:
            raise ValueError(f"windows of {window} do not divide a grid of {self.grid}")
        band = (torch.arange(self.grid) + (window - window // 2 if shifted else 0)) // window
        if rolled:
            band %= self.grid // window
        return (band[:, None] * self.grid + band[None, :]).flatten()

    def sees(self, channel: str, window: int = 0, shifted: bool = False) -> Tensor:
        """Bool [F * N, F * N]: row sees column, in laid order. `channel` is "spatial" or "temporal"."""
        position = torch.arange(self.clip_tokens)
        frame = position // self.frame_tokens
        raster = position % self.frame_tokens
        order_key = frame * self.frame_steps + torch.tensor(self.steps)[raster]  # when it is predicted

        given = frame < len(self.given)
        both = given[:, None] & given[None, :]

        tile = frame if channel == "spatial" else self.tiles(window, shifted)[raster]
        near = tile[:, None] == tile[None, :]
        if self.reference and channel == "temporal":
            tile = self.tiles(window, shifted, rolled=True)[raster]
            near |= both & (tile[:, None] == tile[None, :])

        return ((order_key[None, :] <= order_key[:, None]) | both) & near

    def groups(self, channel: str, window: int = 0, shifted: bool = False) -> Tensor:
        """[G, n] laid positions that attend together (before the mask): frames, rolled windows, or all."""
        positions = torch.arange(self.clip_tokens).view(self.frames, self.grid, self.grid)
        if channel == "spatial":
            return positions.flatten(1)
        if window == 0:
            return positions.view(1, -1)
        if shifted:
            positions = positions.roll((-(window // 2), -(window // 2)), (1, 2))
        cut = positions.unfold(1, window, window).unfold(2, window, window)  # [F, rows, columns, w, w]
        return cut.permute(1, 2, 0, 3, 4).reshape(-1, self.frames * window * window)

    @lru_cache(maxsize=32)
    def segments(self, channel: str, window: int = 0, shifted: bool = False) -> "Segments":
        """Where a cache stores keys, so that what a token sees is one slice.

        Each tile has a segment: the text, then its tokens, frame after frame, in the order of their steps.
        The spatial channel has a segment for each frame generated at the same time; later frames reuse them.
        """
        segments = Segments(*([0] * self.clip_tokens for _ in range(3)))
        for start, members in self._tile_segments(channel, window, shifted):
            ordered = sorted(members, key=self._order_key)
            keys = [self._order_key(position) for position in ordered]
            first = start + self.text_len
            for i, position in enumerate(ordered):
                segments.start[position] = start
                segments.slot[position] = first + i
                segments.end[position] = first + bisect_right(keys, keys[i])
        return segments

    def _order_key(self, position: int) -> tuple[int, int]:
        """When a laid position is predicted: its frame, counted in laid order, and its step."""
        return position // self.frame_tokens, self.steps[position % self.frame_tokens]

    def _tile_segments(self, channel: str, window: int, shifted: bool) -> Iterator[tuple[int, Sequence[int]]]:
        """For each tile, where its segment starts and the laid positions in it."""
        size = self.frame_tokens
        if channel == "spatial":
            parallel = -(-self.frame_steps // self.lag(window))  # frames generated at the same time
            lanes = min(parallel, max(1, self.frames - len(self.given)))
            for frame in range(self.frames):
                yield frame % lanes * (self.text_len + size), range(frame * size, (frame + 1) * size)
            return

        tile = self.tiles(window, shifted).repeat(self.frames)
        start = 0
        for number in sorted(set(tile.tolist())):
            members = (tile == number).nonzero().flatten().tolist()
            yield start, members
            start += self.text_len + len(members)

    # -- which tokens can be generated at the same time

    @lru_cache(maxsize=32)
    def lag(self, window: int) -> int:
        """Steps by which a frame must lag behind the previous laid frame to be generated alongside it.

        Token j of a frame needs the tokens of its tiles, of both cuts, in the previous frame. With full
        attention that is the whole frame (CogVideo section 3.3.2: parallel generation).
        """
        if window == 0:
            return self.frame_steps
        steps = torch.tensor(self.steps)
        needs = 0
        for shifted in (False, True):
            tile = self.tiles(window, shifted)
            last = torch.stack([steps[tile == number].max() for number in tile])
            needs = max(needs, int((last - steps).max()))
        return min(needs + 1, self.frame_steps)

    def waves(self, known: int, window: int) -> Iterator[list[int]]:
        """The laid positions after `known` frames, in groups that can be generated at the same time."""
        lag = self.lag(window)
        remaining = self.frames - known
        rasters: list[list[int]] = [[] for _ in range(self.frame_steps)]  # of each step of a frame
        for raster, step in enumerate(self.steps):
            rasters[step].append(raster)

        ticks = self.frame_steps + (remaining - 1) * lag if remaining else 0
        for tick in range(ticks):
            wave: list[int] = []
            for k in range(remaining):
                step = tick - k * lag
                first = (known + k) * self.frame_tokens
                if 0 <= step < self.frame_steps:
                    wave += [first + raster for raster in rasters[step]]
            yield wave

    def as_text(self, channel: str, window: int = 0, shifted: bool = False) -> str:
        """The mask as text: a row for each frame token, `#` where it sees another, a gap between frames."""
        rows = []
        for i, row in enumerate(self.sees(channel, window, shifted).tolist()):
            marks = "".join("#" if seen else "." for seen in row)
            frames = [marks[k : k + self.frame_tokens] for k in range(0, len(marks), self.frame_tokens)]
            rows.append(" ".join(frames))
            if (i + 1) % self.frame_tokens == 0 and i + 1 < self.clip_tokens:
                rows.append("")
        return "\n".join(rows)

"""The regression family: a caption becomes all frames of a clip in one pass, without sampling.

    caption ------- encoder ----.
                                 v
    positions, fps - decoder ----+---- video generation layer ---- video refinement layer ---- frames

Encoder and decoder are transformers that share one vocabulary and one embedding. Each query of the decoder is
a position: those of a frame and of a patch, plus the frame-rate token. The video generation layer projects
each state to the pixels of its patch; the video refinement layer adds a residual of convolutions over each
frame and its neighbours in time. A sigmoid of the sum keeps pixels in bounds.

A frame has the same number at every frame rate, so what a model learns about a moment at a low rate stays
valid at a high one:

    1 fps, 5 frames      0               8               16              24              32
    8 fps, 33 frames     0 1 2 3 4 5 6 7 8 9 ...

Legend: B batch, T text_len, F requested frames, P patches a frame, p pixels a side of a patch, R resolution,
D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.model.config import MOST_WEIGHTS, Id, Ids, Range, Size, SmallCount, SmallSize
from cogvideo.model.refiner import Refiner, RefinerConfig
from cogvideo.model.transformer import init_normal, text_ranks

Fps = Annotated[float, Range(0.01, 1000)]


@dataclass(frozen=True)
class RegressionConfig:
    layers: SmallSize  # of the encoder, and as many of the decoder
    width: Size
    heads: SmallSize
    vocab: Ids  # ids of text; a token for each of `rates` follows them
    pad: Id
    text_len: Size = 256
    resolution: Size = 64  # pixels a side of a frame
    patch: Size = 64  # of a patch
    frames: SmallSize = 32  # of a clip at the highest fps
    rates: tuple[Fps, ...] = (1.0, 8.0)  # fps; the last is that of a full clip
    refine_width: Size = 32
    refine_blocks: SmallCount = 2

    def __post_init__(self) -> None:
        if self.resolution % self.patch:
            raise ValueError(
                f"patch must divide the {self.resolution} pixels of a frame (resolution); got {self.patch}"
            )
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width {self.width}; got {self.heads}")
        if not self.rates:
            raise ValueError("rates must name a frame rate; got none")
        if any(self.rates[-1] % fps for fps in self.rates):
            raise ValueError(
                f"rates must divide the last one, the full rate {self.rates[-1]:g}; got {self.rates}"
            )
        if self.layers * self.width**2 > MOST_WEIGHTS:
            raise ValueError(f"width {self.width} is too large for {self.layers} layers (layers)")

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.resolution // self.patch

    def slots(self, fps: float) -> range:
        """The frames that a clip has at this fps, as numbers of frames at the highest fps."""
        if fps not in self.rates:
            choices = ", ".join(f"{choice:g}" for choice in self.rates)
            raise ValueError(f"no frame-rate token for {fps:g} frames a second; choose one of {choices}")
        return range(0, self.frames, round(self.rates[-1] / fps))


class RegressionTransformer(nn.Module):
    """`forward(text, fps, slots)`: text ids [B, T] to frames [B, F, 3, R, R]."""

    trained: Tensor  # bool [fps, frames]: the frames it was trained for at each fps

    def __init__(self, config: RegressionConfig):
        super().__init__()
        self.config = config
        c = config
        self.embed = nn.Embedding(c.vocab + len(c.rates), c.width)
        self.text_positions = nn.Embedding(c.text_len, c.width)
        self.frame_positions = nn.Embedding(c.frames, c.width)
        self.patch_positions = nn.Embedding(c.grid**2, c.width)
        layer: Any = {
            "d_model": c.width,
            "nhead": c.heads,
            "dim_feedforward": 4 * c.width,
            "dropout": 0.0,
            "activation": F.gelu,
            "batch_first": True,
            "norm_first": True,
        }
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**layer), c.layers, nn.LayerNorm(c.width), enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(**layer), c.layers, nn.LayerNorm(c.width)
        )
        self.generation = nn.Linear(c.width, 3 * c.patch**2)
        self.refinement = Refiner(RefinerConfig(1, c.refine_width, c.refine_blocks))
        self.register_buffer("trained", torch.zeros(len(c.rates), c.frames, dtype=torch.bool))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        init_normal(self, generator)
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_weight, std=0.02, generator=generator)

    def prepare(self, fps: float, slots: Sequence[int]) -> None:
        """Prepare for training these frames at this fps."""
        self.spread(self.trained.any(0))
        self.trained[self.config.rates.index(fps), list(slots)] = True

    @torch.no_grad()
    def spread(self, known: Tensor) -> None:
        """Interpolate the positions of all other frames between the known ones, bool [F]; beyond them, copy.
        After an image model, all are copies of the first."""
        table = self.frame_positions.weight
        numbers = known.nonzero().flatten().tolist()
        if numbers:
            columns = table[numbers].cpu().double().numpy().T
            spread = [np.interp(np.arange(len(table)), numbers, column) for column in columns]
            table.copy_(torch.from_numpy(np.stack(spread, 1)))

    def shared_rows(
        self, other: "RegressionTransformer", same_words: bool
    ) -> dict[str, list[tuple[int, int]]]:
        """The rows with the same meaning, here and in another model: words if they are the same, tokens of
        the same fps, and the times of frames that both have."""
        here = self.config
        there = other.config
        words = min(here.vocab, there.vocab) if same_words else 0
        embed = [(i, i) for i in range(words)]
        embed += [(here.vocab + i, there.vocab + j) for i, j in self._shared_fps(other)]
        return {
            "embed.weight": embed,
            "frame_positions.weight": [(i, i) for i in range(self._shared_times(other))],
        }

    def take_trained(self, other: "RegressionTransformer", complete: bool) -> None:
        """Spread the frame positions that were taken from another model. If all tensors were, the frames that
        it was trained for count as trained here as well."""
        times = self._shared_times(other)
        self.spread(other.trained[:, :times].any(0))
        if complete:
            for here, there in self._shared_fps(other):
                self.trained[here, :times] = other.trained[there, :times]

    def _shared_fps(self, other: "RegressionTransformer") -> list[tuple[int, int]]:
        """The indices of equal fps, here and in another model."""
        here = self.config.rates
        there = other.config.rates
        return [(here.index(fps), there.index(fps)) for fps in here if fps in there]

    def _shared_times(self, other: "RegressionTransformer") -> int:
        """How many first frames stand at the same times in both."""
        here = self.config
        there = other.config
        if here.rates[-1] != there.rates[-1]:
            return 1
        return min(here.frames, there.frames)

    def forward(self, text: Tensor, fps: float, slots: Sequence[int] | None = None) -> Tensor:
        """text [B, T], left-padded ids, to frames [B, F, 3, R, R] in [0, 1]: those of `slots`, by default all
        that a clip has at `fps`."""
        c = self.config
        slots = list(c.slots(fps) if slots is None else slots)
        padding = text == c.pad
        padding[:, -1] = False  # an empty caption attends to one padding token, not to nothing
        x = self.embed(text) + self.text_positions(text_ranks(text, c.pad))  # [B, T, D]
        memory = self.encoder(x, src_key_padding_mask=padding)

        token = torch.tensor(c.vocab + c.rates.index(fps), device=text.device)
        frames = self.frame_positions.weight[slots] + self.embed(token)  # [F, D]
        queries = frames[:, None] + self.patch_positions.weight  # [F, P, D]
        queries = queries.flatten(0, 1).expand(len(text), -1, -1)  # [B, F * P, D]
        states = self.decoder(queries, memory, memory_key_padding_mask=padding)

        patches = self.generation(states)  # [B, F * P, 3 * p * p]
        patches = patches.view(-1, c.grid, c.grid, 3 * c.patch**2).permute(0, 3, 1, 2)
        generated: Tensor = F.pixel_shuffle(patches, c.patch).unflatten(0, (len(text), -1))  # [B, F, 3, R, R]
        return (generated + self.refinement.detail(generated.sigmoid())).sigmoid()

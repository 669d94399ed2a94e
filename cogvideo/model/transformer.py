"""The dual-channel transformer (CogVideo section 3.2).

A text-to-image transformer (`Base`: CogView2 in the paper, our `image` phase in the tiny family) gains a
second attention channel in every block (`TemporalChannel`), mixed in by one gate a dimension. Notable:
- Without a temporal channel the class is the text-to-image model itself; with one it is stage 1 or stage 2.
  Both stages share one `Base` object and bring a channel of their own.
- One `forward` for training and for stepping: with a cache, whole frames first, then a token a row, or a few.
- Sandwich layer norm, tanh GELU, a head tied to the image rows of the embedding. The loss and the samplers
  only ever see logits of image codes.

Ids: image codes first, [0, codes), then text. Legend: B batch, T text_len, S frame tokens, D width, V codes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.layout import Layout
from cogvideo.model.attention import (
    Attention,
    Channels,
    attend_groups,
    attend_step,
    attend_text,
    groups_of,
    turns_of,
)
from cogvideo.model.cache import Cache, ChannelCache


def squared_relu(x: Tensor) -> Tensor:
    """ReLU^2 (Primer, So 2021); in place where no gradient is wanted, since fresh memory costs more than the
    arithmetic."""
    y = F.relu(x)
    return y.square() if y.requires_grad else y.square_()


NORMS = ("sandwich", "pre")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": partial(F.gelu, approximate="tanh"),
    "relu2": squared_relu,
}


@dataclass(frozen=True)
class ModelConfig:
    layers: int
    width: int
    heads: int
    vocab: int  # image codes and text pieces together
    codes: int  # image codes, the first ids
    pad: int  # id of padding, in front of short texts
    start: int  # id of start-of-image, in slot 0 of every frame
    text_len: int
    grid: int
    frames: int = 5  # of one window
    text_positions: int = 0  # rows of the position table before those of frame 0; 0 means text_len
    window: int = 0  # of the temporal channel of stage 2; stage 1 has full attention
    dropout: float = 0.0
    # what the original has not, each off by default
    rotary: bool = False  # queries and keys are rotated by time, row and column
    qk_norm: bool = False  # queries and keys are normalised
    activation: str = "gelu"  # of the MLP: gelu, or relu2 (Primer, So 2021)
    norm: str = "sandwich"  # layer norms before and after each half of a block, or pre: before it
    zero_init: bool = False  # the last matrix of each half of a block starts at 0
    skew: int = 0  # codes are predicted a diagonal at a time (`Layout`)

    def __post_init__(self) -> None:
        for name, choices in {"activation": ACTIVATIONS, "norm": NORMS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name, value in vars(self).items():
            if name in ("activation", "norm"):
                continue
            if not isinstance(value, (int, float)) or value < 0:
                raise ValueError(f"{name} must be a number, 0 or more; got {value!r}")

    @property
    def frame_len(self) -> int:
        return self.grid * self.grid

    def layout(self, stage: str) -> Layout:
        """Where the tokens of a stage stand: image, stage1 or stage2."""
        sizes = (self.text_len, self.grid, self.frames)
        if stage == "image":
            return Layout.image(*sizes[:2], self.skew)
        return {"stage1": Layout.keyframes, "stage2": Layout.interpolation}[stage](*sizes, self.skew)

    @property
    def first_frame(self) -> int:
        """Position of the first token of frame 0."""
        return self.text_positions or self.text_len


class Block(nn.Module):
    """The inherited part of one layer: spatial attention and MLP, each between two layer norms."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        sandwich = config.norm == "sandwich"
        self.norm3: nn.Module = nn.LayerNorm(width) if sandwich else nn.Identity()
        self.norm4: nn.Module = nn.LayerNorm(width) if sandwich else nn.Identity()
        self.attention = Attention(width, config.heads, config.qk_norm)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = config.dropout

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, S, D] to the same; `attend` is the attention of this layer over all its channels. A layer is a
        whole here, so that it can be sharded, recomputed or compiled."""
        x = x + self.norm3(attend(self.norm1(x)))
        return x + self.norm4(self.mlp(self.norm2(x)))

    def mlp(self, x: Tensor) -> Tensor:
        return F.dropout(self.down(self.activation(self.up(x))), self.dropout, self.training)


class TiedHead:
    """Hidden states to logits of the image codes, by the rows of the embedding; it owns no weights."""

    def __init__(self, embed: nn.Embedding, codes: int):
        self.embed, self.codes = embed, codes

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed.weight[: self.codes])


class Base(nn.Module):
    """The text-to-image transformer: embeddings, positions of text and of frame 0, blocks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.first_frame + config.frame_len, config.width)
        self.blocks = cast("list[Block]", nn.ModuleList(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        self.head = TiedHead(self.embed, config.codes)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        init_normal(self, generator)
        scale = 0.0 if self.config.zero_init else (2 * self.config.layers) ** -0.5
        with torch.no_grad():
            for block in self.blocks:
                block.attention.out.weight.mul_(scale)
                block.down.weight.mul_(scale)


class TemporalChannel(nn.Module):
    """What a stage adds: attention over frames in every layer, its gate, and positions of the frames after
    the first."""

    def __init__(self, config: ModelConfig, window: int):
        super().__init__()
        self.window = window  # 0: full attention
        self.positions = nn.Embedding((config.frames - 1) * config.frame_len, config.width)
        attention = nn.ModuleList(
            Attention(config.width, config.heads, config.qk_norm) for _ in range(config.layers)
        )
        self.attention = cast("list[Attention]", attention)
        self.gate = nn.ParameterList(torch.zeros(config.width) for _ in range(config.layers))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        init_normal(self, generator)
        for gate in self.gate:
            nn.init.zeros_(gate)

    @torch.no_grad()
    def inherit(self, base: Base) -> None:
        """Start as a copy of the base: its attention in every layer, its frame-0 positions for every frame.
        The gates stay at one half."""
        first = base.positions.weight[base.config.first_frame :]
        self.positions.weight.copy_(first.repeat(len(self.positions.weight) // len(first), 1))
        for mine, block in zip(self.attention, base.blocks):
            mine.load_state_dict(block.attention.state_dict())


class DualChannelTransformer(nn.Module):
    """`forward(tokens, layout, cache)` to logits over image codes."""

    def __init__(self, base: Base, temporal: TemporalChannel | None = None):
        super().__init__()
        self.config = base.config
        self.base = base
        self.temporal = temporal
        self.window = 0 if temporal is None else temporal.window
        self.kinds = ("spatial",) if temporal is None else ("spatial", "temporal")
        self.channels = [Channels([block.attention], None) for block in base.blocks]
        if temporal is not None:
            layers = zip(base.blocks, temporal.attention, temporal.gate)
            self.channels = [Channels([block.attention, plus], gate) for block, plus, gate in layers]

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        cache: Cache | None = None,
        places: Sequence[int] | None = None,
        boost: float = 0.0,
    ) -> Tensor:
        """Logits of the next image code at every frame slot, float32 [B, S, V].

        tokens: [B, T + S], text (left-padded) and S tokens of the first whole laid frames. With a cache these
        are the prompt, and after it come steps: [B, m] tokens at the m laid `places`, one or several that do
        not depend on each other. boost: added to the scores of frames towards text
        (docs/reference.md, "Inference"); steps go on with that of their prompt.
        """
        return self.head(self.body(tokens, layout, cache, places, boost))

    def head(self, hidden: Tensor) -> Tensor:
        """[B, S, D] to float32 logits [B, S, V]; tied to the embedding of the image codes."""
        return self.base.head(hidden).float()

    def body(
        self,
        tokens: Tensor,
        layout: Layout,
        cache: Cache | None = None,
        places: Sequence[int] | None = None,
        boost: float = 0.0,
        corners: Tensor | None = None,
    ) -> Tensor:
        """Like `forward`, up to the last norm: [B, S, D]."""
        if cache is not None and places is not None:
            return self._step(tokens, cache, places)
        x, _, attend = self._begin(tokens, layout, cache, boost, corners)
        for layer, block in enumerate(self.base.blocks):
            x = block(x, partial(attend, layer))
        return self.base.norm(x[:, layout.text_len :])

    def prefill(self, tokens: Tensor, layout: Layout, cache: Cache, boost: float = 0.0) -> None:
        """Write a prompt into an empty cache, as `forward` does; the last layer computes keys and values
        only, since what follows the prompt is not asked for."""
        x, turns, attend = self._begin(tokens, layout, cache, boost)
        *blocks, last = self.base.blocks
        for layer, block in enumerate(blocks):
            x = block(x, partial(attend, layer))
        self._write(len(blocks), self.channels[-1].project(last.norm1(x), turns), layout.text_len, cache)

    def _begin(
        self,
        tokens: Tensor,
        layout: Layout,
        cache: Cache | None,
        boost: float,
        corners: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Callable[..., Tensor]]:
        """Text and frames as they enter the first layer [B, T + S, D], their rotations, and the attention of
        a layer."""
        text = tokens[:, : layout.text_len]
        bias = text_bias(text, self.config.pad, self.base.norm.weight.dtype) + boost
        if cache is not None:
            cache.write_bias(bias)
        x = self._embed(tokens, layout, corners)
        turns = self._turns(layout, x.device, corners)
        turns = None if turns is None else turns[..., : x.shape[1], :]
        attend = partial(self._attend, layout=layout, bias=bias, cache=cache, boost=boost, turns=turns)
        return x, turns, attend

    def new_cache(self, layout: Layout, batch: int) -> Cache:
        """An empty cache for `batch` rows of this layout."""
        c, like = self.config, self.base.norm.weight
        sizes = (c.layers, batch, c.heads, c.width // c.heads)
        channels = [ChannelCache(layout, kind, self.window, sizes, like) for kind in self.kinds]
        longest = max(channel.longest for channel in channels)
        turns = self._turns(layout, like.device)
        return Cache(
            channels,
            self._frame_positions(layout),
            like.new_zeros(batch * c.heads, 1, longest),
            None if turns is None else turns[:, layout.text_len :],
        )

    # -- one layer of whole sequences

    def _embed(self, tokens: Tensor, layout: Layout, corners: Tensor | None = None) -> Tensor:
        """Text and the first frames, each with its position: [B, T + S] to [B, T + S, D]."""
        ranks = text_ranks(tokens[:, : layout.text_len], self.config.pad)
        frames = self._frame_positions(layout, corners)[..., : tokens.shape[1] - layout.text_len, :].expand(
            len(tokens), -1, -1
        )
        x = self.base.embed(tokens) + torch.cat((self.base.positions(ranks), frames), 1)
        return F.dropout(x, self.config.dropout, self.training)

    def _frame_positions(self, layout: Layout, corners: Tensor | None = None) -> Tensor:
        """[F * N, D] in laid order; frame 0 has the base's positions, later frames those of the temporal
        channel."""
        table = self.base.positions.weight[self.config.first_frame :]
        if self.temporal is not None:
            table = torch.cat((table, self.temporal.positions.weight))
        if corners is None:
            return table[layout.positions(table.device)]
        time, row, column = (layout.axes(table.device) + F.pad(corners, (1, 0))[:, None]).unbind(-1)
        return table[(time * self.config.grid + row) * self.config.grid + column]

    def _turns(self, layout: Layout, device: torch.device, corners: Tensor | None = None) -> Tensor | None:
        """[2, T + F * N, d] the rotations of text, which has none, and of all laid places; None without
        rotary embedding."""
        if not self.config.rotary:
            return None
        width = self.config.width // self.config.heads
        if corners is None:
            return turns_of_layout(layout, width, device)
        axes = layout.axes(device) + F.pad(corners, (1, 0))[:, None]
        axes = F.pad(axes, (0, 0, layout.text_len, 0))  # [B, T + S, 3]
        return turns_of(axes.flatten(0, 1), width).unflatten(1, axes.shape[:2])[:, :, None]

    def _attend(
        self,
        layer: int,
        x: Tensor,
        layout: Layout,
        bias: Tensor,
        cache: Cache | None,
        boost: float = 0.0,
        turns: Tensor | None = None,
    ) -> Tensor:
        """Attention of one layer over text and whole frames: [B, T + S, D] to the same."""
        text_len, dropout = layout.text_len, self.config.dropout if self.training else 0.0
        qkvs = self.channels[layer].project(x, turns)
        if cache is not None:
            self._write(layer, qkvs, text_len, cache)
        if x.shape[1] - text_len < layout.tokens:  # a prompt: the first frames of the layout
            layout = layout.first((x.shape[1] - text_len) // layout.frame_len)
        seen = []
        shifted = bool(self.window) and layer % 2 == 1
        for qkv, kind in zip(qkvs, self.kinds):
            text, frames = qkv.tensor_split((text_len,), 3)  # [3, B, H, T, d], [3, B, H, S, d]
            if kind == "spatial":  # text never looks over frames, so its temporal query goes unused
                text_seen = attend_text(text, bias, dropout)
            if layout.frames:
                groups = groups_of(layout, kind, self.window, shifted, x.device, x.dtype)
                forgotten = layout.reference and kind == "temporal"  # the original boosts steps alone there
                towards = bias - boost if forgotten else bias
                seen.append(attend_groups(frames, text[1:], groups, towards, dropout))
        text_out = self.base.blocks[layer].attention.out(text_seen)
        return torch.cat((text_out, self.channels[layer].merge(seen)), 1) if seen else text_out

    def _write(self, layer: int, qkvs: Sequence[Tensor], text_len: int, cache: Cache) -> None:
        """Keys and values of every channel, of each [3, B, H, T + S, d], into the cache."""
        for qkv, channel in zip(qkvs, cache.channels):
            text, frames = qkv.tensor_split((text_len,), 3)
            channel.write_text(layer, text[1:])
            channel.write(layer, frames[1:])

    # -- one token, or a few

    def _step(self, tokens: Tensor, cache: Cache, places: Sequence[int]) -> Tensor:
        x = self.base.embed(tokens) + cache.positions[places]  # [B, m, D]
        turns = None if cache.turns is None else cache.turns[:, places]
        splits = [channel.split(places) for channel in cache.channels]
        for layer, block in enumerate(self.base.blocks):
            x = block(x, partial(self._attend_step, layer, cache=cache, splits=splits, turns=turns))
        return self.base.norm(x)

    def _attend_step(
        self,
        layer: int,
        x: Tensor,
        cache: Cache,
        splits: Sequence[Sequence[list[list[int]]]],
        turns: Tensor | None,
    ) -> Tensor:
        """Attention of one layer for m new tokens a row, [B, m, D] to the same; `splits` groups their places,
        for each channel."""
        qkvs = self.channels[layer].project(x, turns)  # each [3, B, H, m, d]
        seen = []
        for qkv, channel, split in zip(qkvs, cache.channels, splits):
            seen.append(attend_step(qkv, channel, layer, split[layer % 2], cache.bias))
        return self.channels[layer].merge(seen)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve training too
def turns_of_layout(layout: Layout, width: int, device: torch.device) -> Tensor:
    """[2, T + F * N, width] for `rotate`: text stays as it is, frames turn by time, row and column."""
    text = torch.zeros(layout.text_len, 3, dtype=torch.long, device=device)
    return turns_of(torch.cat((text, layout.axes(device))), width)


def text_ranks(text: Tensor, pad: int) -> Tensor:
    """Positions of left-padded text [B, T]: 0 at its first token, and on padding."""
    return (text != pad).long().cumsum(1).sub(1).clamp_min(0)


def text_bias(text: Tensor, pad: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores towards text [B, T]: 0 on text, -inf on padding."""
    return torch.zeros_like(text, dtype=dtype).masked_fill(text == pad, float("-inf"))


def init_normal(module: nn.Module, generator: torch.Generator | None) -> None:
    """N(0, 0.02) for matrices, 0 for biases, 1 and 0 for norms (docs/reference.md, "Initialisation")."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.02, generator=generator)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)

"""The dual-channel transformer (CogVideo section 3.2).

A text-to-image transformer (`Base`: CogView2 in the paper, our `image` phase in the tiny family) gains a
second attention channel in every block (`TemporalChannel`), mixed in by one gate a dimension. Notable:
- Without a temporal channel the class is the text-to-image model itself; with one it is stage 1 or stage 2.
  Both stages share one `Base` object and each add their own channel.
- `Block.forward` is the whole idea: spatial attention, temporal attention, and the gate between them.
- Sandwich layer norm, tanh GELU, a head tied to the image rows of the embedding. The loss and the samplers
  only ever see logits of image codes.

Ids: image codes first, [0, codes), then text. Legend: B batch, T text_len, S frame tokens, D width, V codes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.layout import Layout
from cogvideo.model.attention import (
    Attention,
    PromptView,
    SequenceView,
    StepView,
    View,
    rotary_table,
)
from cogvideo.model.cache import Cache, Channel, ChannelCache
from cogvideo.model.config import MOST_WEIGHTS, Id, Ids, Range, Size, SmallCount, SmallSize


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
class TransformerConfig:
    """Sizes of the base, and of the stages that share it."""

    layers: SmallSize
    width: Size
    heads: SmallSize
    vocab: Ids  # image codes and text pieces together
    codes: Ids  # image codes, the first ids
    pad: Id  # id of padding, in front of short texts
    start: Id  # id of start-of-image, in slot 0 of every frame
    text_len: Size
    grid: SmallSize
    frames: SmallSize = (
        5  # of one sequence: the key frames of stage 1, or given and generated ones of stage 2
    )
    text_positions: Id = 0  # rows of the position table before those of frame 0; 0 means text_len
    window: SmallCount = 0  # tiles of the temporal attention of stage 2; 0, and in stage 1: full attention
    dropout: Annotated[float, Range(0, 0.99)] = 0.0
    # The original has none of the following; they are off by default (its norm is "sandwich").
    rotary: bool = False  # queries and keys are rotated by time, row and column
    qk_norm: bool = False  # queries and keys are normalised
    activation: str = "gelu"  # of the MLP: gelu, or relu2 (Primer, So 2021)
    norm: str = "sandwich"  # layer norms before and after each sublayer (attention, MLP); pre: before only
    zero_init: bool = False  # the last matrix of each sublayer starts at 0
    skew: SmallCount = 0  # codes are predicted a diagonal at a time (`Layout`)

    def __post_init__(self) -> None:
        for name, choices in {"activation": ACTIVATIONS, "norm": NORMS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width {self.width}; got {self.heads}")
        if self.rotary and self.width // self.heads % 2:
            raise ValueError(f"heads must have an even width to be rotated; got {self.width} / {self.heads}")
        if self.layers * self.width**2 > MOST_WEIGHTS:
            raise ValueError(f"width {self.width} is too large for {self.layers} layers (layers)")
        if self.window and self.grid % self.window:
            raise ValueError(f"window must divide the grid {self.grid}; got {self.window}")
        for name in ("pad", "start"):
            value = getattr(self, name)
            if value >= self.vocab:
                raise ValueError(f"{name} must be less than the vocab {self.vocab}; got {value}")
        if self.codes > self.vocab:
            raise ValueError(f"codes must be at most the vocab {self.vocab}; got {self.codes}")

    @property
    def frame_tokens(self) -> int:
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


class TemporalLayer(NamedTuple):
    """What a stage adds to one layer: its attention over frames, and its gate."""

    attention: Attention
    gate: nn.Parameter  # [D]


class Block(nn.Module):
    """One layer of the base, whose forward takes the temporal layer of a stage as well (section 3.2).

    The paper calls the spatial attention attention-base, the temporal one attention-plus. A stage trains the
    temporal attention and the gate; all that the block itself owns is inherited and frozen.
    """

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        width = config.width
        sandwich = config.norm == "sandwich"
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3: nn.Module = nn.LayerNorm(width) if sandwich else nn.Identity()
        self.norm4: nn.Module = nn.LayerNorm(width) if sandwich else nn.Identity()
        self.attention = Attention(width, config.heads, config.qk_norm, channel="spatial", layer=layer)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = config.dropout

    def forward(self, x: Tensor, view: View, temporal: TemporalLayer | None = None) -> Tensor:
        """[B, T + S, D] to the same.

        With a = sigmoid(gate), one number a dimension, frames become

            a * spatial(norm1(x)) + (1 - a) * temporal(norm1(x))

        Text passes through the spatial attention alone: it is the same for every frame.
        """
        h = self.norm1(x)
        text, frames = self.attention(h, view)

        if temporal is not None:
            _, over_time = temporal.attention(h, view)
            gate = temporal.gate.sigmoid().to(frames.dtype)
            frames = torch.lerp(over_time, frames, gate)

        h = frames if text is None else torch.cat((text, frames), 1)
        x = x + self.norm3(h)

        h = self.mlp(self.norm2(x))
        x = x + self.norm4(h)
        return x

    def write_keys(self, x: Tensor, view: PromptView, temporal: TemporalLayer | None = None) -> None:
        """Write the keys and values of [B, T + S, D] into the cache of a prompt, and compute nothing else."""
        h = self.norm1(x)
        attentions = [self.attention] if temporal is None else [self.attention, temporal.attention]
        for attention in attentions:
            qkv = attention.project(h, view.rotary)
            view.cache.write(attention.channel, attention.layer, qkv)

    def mlp(self, x: Tensor) -> Tensor:
        return F.dropout(self.down(self.activation(self.up(x))), self.dropout, self.training)


class TiedHead:
    """Hidden states to logits of the image codes, by the rows of the embedding; it owns no weights."""

    def __init__(self, embed: nn.Embedding, codes: int):
        self.embed = embed
        self.codes = codes

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed.weight[: self.codes])


class Layer(Protocol):
    """A `Block`, or another implementation of the same (int8.JointBlock)."""

    def __call__(self, x: Tensor, view: View, temporal: TemporalLayer | None = None) -> Tensor: ...

    def write_keys(self, x: Tensor, view: PromptView, temporal: TemporalLayer | None = None) -> None: ...


class Base(nn.Module):
    """The text-to-image transformer: embeddings, positions of text and of frame 0, blocks."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.first_frame + config.frame_tokens, config.width)
        self.blocks = cast("list[Block]", nn.ModuleList(Block(config, n) for n in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        self.head = TiedHead(self.embed, config.codes)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        init_normal(self, generator)
        scale = 0.0 if self.config.zero_init else (2 * self.config.layers) ** -0.5
        with torch.no_grad():
            for block in self.blocks:
                block.attention.out.weight.mul_(scale)
                block.down.weight.mul_(scale)

    def shared_rows(self, other: "Base", same_words: bool) -> dict[str, list[tuple[int, int]]]:
        """The embedding's rows with the same meaning, here and in another base: image codes, and words if
        they are the same."""
        here = self.config
        there = other.config
        count = here.vocab if same_words else here.codes
        if here.codes != there.codes:
            count = 0
        return {"embed.weight": [(i, i) for i in range(min(count, there.vocab))]}


class TemporalChannel(nn.Module):
    """What a stage adds: attention over frames in every layer, its gate, and positions of the frames after
    the first."""

    def __init__(self, config: TransformerConfig, window: int):
        super().__init__()
        self.window = window  # 0: full attention
        self.positions = nn.Embedding((config.frames - 1) * config.frame_tokens, config.width)
        attention = nn.ModuleList(
            Attention(config.width, config.heads, config.qk_norm, channel="temporal", layer=layer)
            for layer in range(config.layers)
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
        for attention, block in zip(self.attention, base.blocks):
            attention.load_state_dict(block.attention.state_dict())


class DualChannelTransformer(nn.Module):
    """A base and, for a stage, its temporal channel.

    `forward` computes whole sequences, for training. Generation writes a prompt into a cache by `prefill`,
    then computes token after token by `step`.
    """

    def __init__(self, base: Base, temporal: TemporalChannel | None = None):
        super().__init__()
        self.config = base.config
        self.base = base
        self.temporal = temporal
        self.window = 0 if temporal is None else temporal.window
        self.channels: tuple[Channel, ...] = ("spatial",)
        self.layers: list[tuple[Layer, TemporalLayer | None]] = [(block, None) for block in base.blocks]
        if temporal is not None:
            self.channels = ("spatial", "temporal")
            temporal_layers = map(TemporalLayer, temporal.attention, temporal.gate)
            self.layers = list(zip(base.blocks, temporal_layers))

    def forward(self, tokens: Tensor, layout: Layout, boost: float = 0.0) -> Tensor:
        """Logits of the next image code at every frame slot, float32 [B, S, V].

        tokens [B, T + S]: text (left-padded) and S tokens of the first whole laid frames; boost: added to the
        scores of frames towards text (docs/reference.md, "Inference").
        """
        return self.head(self.hidden(tokens, layout, boost))

    def hidden(
        self, tokens: Tensor, layout: Layout, boost: float = 0.0, corners: Tensor | None = None
    ) -> Tensor:
        """Hidden states of the frames after the last norm [B, S, D], for `head`. corners [B, 2]: if the
        frames are crops of larger ones, their first rows and columns in these."""
        x = self._embed(tokens, layout, corners)  # [B, T + S, D]
        view = SequenceView(
            layout=self._of_tokens(tokens, layout),
            window=self.window,
            bias=self._bias(tokens, layout, boost),
            rotary=self._rotary_table(layout, x.device, x.shape[1], corners),
            boost=boost,
            dropout=self.config.dropout if self.training else 0.0,
        )
        for block, temporal in self.layers:
            x = block(x, view, temporal)
        hidden: Tensor = self.base.norm(x[:, layout.text_len :])
        return hidden

    def prefill(self, tokens: Tensor, layout: Layout, cache: Cache, boost: float = 0.0) -> None:
        """Write a prompt [B, T + S], as `forward` takes it, into an empty cache. The steps that follow keep
        its boost."""
        x = self._embed(tokens, layout)
        view = PromptView(
            layout=self._of_tokens(tokens, layout),
            window=self.window,
            bias=self._bias(tokens, layout, boost),
            rotary=self._rotary_table(layout, x.device, x.shape[1]),
            boost=boost,
            cache=cache,
        )
        cache.write_bias(view.bias)
        *layers, (last, last_temporal) = self.layers
        for block, temporal in layers:
            x = block(x, view, temporal)
        last.write_keys(x, view, last_temporal)  # the prompt's own output is not needed

    def step(self, tokens: Tensor, cache: Cache, positions: Sequence[int]) -> Tensor:
        """Logits after tokens [B, m] at m laid positions that do not depend on each other: float32
        [B, m, V]."""
        x = self.base.embed(tokens) + cache.positions[positions]  # [B, m, D]
        view = StepView(cache, positions)
        for block, temporal in self.layers:
            x = block(x, view, temporal)
        return self.head(self.base.norm(x))

    def head(self, hidden: Tensor) -> Tensor:
        """[B, S, D] to float32 logits [B, S, V]; tied to the embedding of the image codes."""
        return self.base.head(hidden).float()

    def new_cache(self, layout: Layout, batch: int) -> Cache:
        """An empty cache for `batch` rows of this layout."""
        c = self.config
        like = self.base.norm.weight
        heads = self.base.blocks[0].attention.heads  # of the config, or where they are shared, those here
        sizes = (c.layers, batch, heads, c.width // c.heads)
        channels = {name: ChannelCache(layout, name, self.window, sizes, like) for name in self.channels}
        longest = max(channel.longest for channel in channels.values())
        bias = like.new_zeros(batch * heads, 1, longest)
        rotary = self._rotary_table(layout, like.device)
        if rotary is not None:
            rotary = rotary[:, layout.text_len :]
        return Cache(channels, self._frame_positions(layout), bias, rotary)

    # -- the input of the first layer, and what all layers share

    def _of_tokens(self, tokens: Tensor, layout: Layout) -> Layout:
        """The layout of the frames among the tokens: all, or the first ones."""
        count = tokens.shape[1] - layout.text_len
        return layout if count == layout.clip_tokens else layout.first(count // layout.frame_tokens)

    def _bias(self, tokens: Tensor, layout: Layout, boost: float) -> Tensor:
        """[B, T] added to the scores of text."""
        text = tokens[:, : layout.text_len]
        return text_bias(text, self.config.pad, self.base.norm.weight.dtype) + boost

    def _embed(self, tokens: Tensor, layout: Layout, corners: Tensor | None = None) -> Tensor:
        """Text and the first frames, each with its position: [B, T + S] to [B, T + S, D]."""
        ranks = text_ranks(tokens[:, : layout.text_len], self.config.pad)
        count = tokens.shape[1] - layout.text_len
        frames = self._frame_positions(layout, corners)[..., :count, :].expand(len(tokens), -1, -1)
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
        time, row, column = layout.axes_at(corners).unbind(-1)
        return table[(time * self.config.grid + row) * self.config.grid + column]

    def _rotary_table(
        self, layout: Layout, device: torch.device, count: int | None = None, corners: Tensor | None = None
    ) -> Tensor | None:
        """[2, T + F * N, d] the rotations of text, which has none, and of all laid positions, or of the first
        `count` of all these; None without rotary embedding."""
        if not self.config.rotary:
            return None
        width = self.config.width // self.config.heads
        if corners is None:
            rotary = layout_rotary_table(layout, width, device)
        else:
            axes = F.pad(layout.axes_at(corners), (0, 0, layout.text_len, 0))  # [B, T + S, 3]
            rotary = rotary_table(axes.flatten(0, 1), width).unflatten(1, axes.shape[:2])[:, :, None]
        return rotary[..., :count, :]


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # cached: must not be an inference tensor, since training uses it
def layout_rotary_table(layout: Layout, width: int, device: torch.device) -> Tensor:
    """[2, T + F * N, width] for `rotate`: text is not rotated, frames are by time, row and column."""
    text = torch.zeros(layout.text_len, 3, dtype=torch.long, device=device)
    return rotary_table(torch.cat((text, layout.axes(device))), width)


def text_ranks(text: Tensor, pad: int) -> Tensor:
    """Positions of left-padded text [B, T]: 0 at its first token, and on padding."""
    return (text != pad).long().cumsum(1).sub(1).clamp_min(0)


def text_bias(text: Tensor, pad: int, dtype: torch.dtype) -> Tensor:
    """The bias on attention scores towards text [B, T]: 0 on text, -inf on padding."""
    return torch.zeros_like(text, dtype=dtype).masked_fill(text == pad, float("-inf"))


def init_normal(module: nn.Module, generator: torch.Generator | None) -> None:
    """N(0, 0.02) for matrices, 0 for biases, 1 and 0 for norms (docs/reference.md, "Initialisation")."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.02, generator=generator)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)

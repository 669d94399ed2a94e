"""Super-resolution of tokens by local attention (CogView2, arXiv 2204.14217, section 4): a small map of image
codes to one `scale` times as large, all codes in one parallel forward.

Known tokens see only one another; each token of the large map sees a window of that map and something known,
in one softmax. The blocks are those of a text-to-image `Base`. There are two kinds:
- direct: text and the small map are known, nothing of the large map is. The large map has attention of its
  own (no gate) and sees a window of the small map, around (row // scale, column // scale), but not the text.
- iterative: text is known, and the large map in part: the start id stands where it is not. All attention is
  the base's, and the large map sees all text. A few rounds predict again what is `due`.

What `o` sees of a 6 x 6 map, with scale 2, window (5, 3), cross (3, 1); beyond the border there is nothing:

    . # # # . .      . # .
    . # o # . .      . # .      direct: the windows of both maps
    . # # # . .      . . .      iterative: the left window and all text
    . # # # . .
    . . . . . .
    . . . . . .

No score of two far tokens is ever made: the large map is cut into tiles, and the queries of a tile meet the
keys within reach of any of them, masked, in one `scaled_dot_product_attention` over all tiles.

Legend: B batch, T text_len, N codes of the small map, P known tokens (T + N or T), S codes of the large map,
G tiles of n queries and m keys, H heads, d width of a head, D width, V codes.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.model.attention import Attention
from cogvideo.model.config import Id, Size, SmallSize
from cogvideo.model.transformer import Base, TransformerConfig, init_normal, text_bias, text_ranks

TILE = 12  # queries a side, about: speed only


@dataclass(frozen=True)
class SuperResConfig:
    grid: SmallSize  # codes a side of the small map
    scale: SmallSize  # of the large map: grid * scale codes a side
    text_len: Size
    pad: Id  # id of padding, in front of short texts; it may be the id of a code, which is never text
    window: tuple[SmallSize, SmallSize]  # rows and columns seen of the large map, both odd
    cross: tuple[SmallSize, SmallSize] | None = None  # the same of the small map; None: iterative

    def __post_init__(self) -> None:
        for name, sides in (("window", self.window), ("cross", self.cross or (1, 1))):
            if len(sides) != 2 or any(side < 1 or side % 2 == 0 for side in sides):
                raise ValueError(f"{name} {sides} must be an odd number of rows and one of columns")

    @property
    def side(self) -> int:
        """Codes a side of the large map."""
        return self.grid * self.scale


@dataclass(frozen=True)
class Tiles:
    """Who attends to whom, as tensors on a device. A tile may stick out of the map: it repeats the rim."""

    queries: Tensor  # [G * n] places of the large map
    keys: Tensor  # [G * m] places among the known tokens that are seen at all, followed by the large map
    mask: Tensor  # [G, 1, n, m] 0 or -inf
    back: Tensor  # [S] where each place stands among the queries


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept must serve training too
def tiles_of(config: SuperResConfig, device: torch.device, dtype: torch.dtype) -> Tiles:
    side, scale = config.side, config.scale
    tile = scale * -(-config.grid // -(-side // TILE))  # as even as multiples of the scale can be

    starts, steps = torch.arange(0, side, tile, device=device), torch.arange(tile, device=device)
    corners = torch.cartesian_prod(starts, starts)[:, None]  # [G, 1, 2]
    query = (corners + torch.cartesian_prod(steps, steps)).clamp(max=side - 1)  # [G, n, 2]

    def within(window: tuple[int, int], ratio: int) -> tuple[Tensor, Tensor]:
        """Places [G, k] of the map `ratio` times smaller that tiles can see; who sees which [G, n, k]."""
        reach, size = torch.tensor(window, device=device) // 2, side // ratio
        rows, columns = (torch.arange(tile // ratio + length - 1, device=device) for length in window)
        key = corners // ratio - reach + torch.cartesian_prod(rows, columns)  # [G, k, 2]
        inside = ((key >= 0) & (key < size)).all(-1)
        near = ((query[:, :, None] // ratio - key[:, None]).abs() <= reach).all(-1)
        row, column = key.clamp(0, size - 1).unbind(-1)
        return row * size + column, near & inside[:, None]

    keys, sees = within(config.window, 1)
    if config.cross:
        known, (first, first_sees) = config.grid**2, within(config.cross, scale)
    else:
        known = config.text_len
        first = torch.arange(known, device=device).expand(len(corners), -1)
        first_sees = sees.new_ones(len(corners), tile**2, known)
    sees = torch.cat((first_sees, sees), -1).unsqueeze(1)
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, float("-inf"))
    queries = (query[..., 0] * side + query[..., 1]).flatten()
    back = torch.empty(side**2, dtype=torch.long, device=device)
    back[queries] = torch.arange(len(queries), device=device)
    return Tiles(queries, torch.cat((first, keys + known), 1).flatten(), mask, back)


def attend_tiles(
    own: Tensor,
    known: Tensor,
    tiles: Tiles,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Tokens of the large map attend to their windows, or to their window and all text.

    own: queries, keys, values [3, B, H, S, d]; known: keys, values of the small map [2, B, H, N, d], or of
    text [2, B, H, T, d] with a bias [B, T] that is added to its scores. Returns [B, S, D]. One row of the
    batch at a time, for the sake of memory.
    """
    count, _, n, m = tiles.mask.shape
    q, k, v = (x.transpose(1, 2) for x in own)
    k, v = (torch.cat((a.transpose(1, 2), b), 1) for a, b in zip(known, (k, v)))  # [B, p + S, H, d]
    rows = []
    for row in range(len(q)):
        tq = q[row].index_select(0, tiles.queries).unflatten(0, (count, n)).transpose(1, 2)  # [G, H, n, d]
        tk, tv = (
            x[row].index_select(0, tiles.keys).unflatten(0, (count, m)).transpose(1, 2) for x in (k, v)
        )  # [G, H, m, d]
        mask = tiles.mask if bias is None else tiles.mask + F.pad(bias[row], (0, m - bias.shape[1]))
        y = F.scaled_dot_product_attention(tq, tk, tv, attn_mask=mask, dropout_p=dropout)
        rows.append(y.transpose(1, 2).flatten(0, 1).index_select(0, tiles.back).flatten(1))  # [S, D]
    return torch.stack(rows)


class SuperResChannel(nn.Module):
    """What super-resolution adds to a base: positions of the large map and, if direct, positions of the small
    map and attention in every layer."""

    def __init__(self, model: TransformerConfig, config: SuperResConfig):
        super().__init__()
        self.config = config
        direct = config.cross is not None
        self.positions = nn.Embedding(config.side**2, model.width)
        self.low_positions = nn.Embedding(config.grid**2, model.width) if direct else None
        attention = nn.ModuleList(Attention(model.width, model.heads) for _ in range(model.layers * direct))
        self.attention = cast("list[Attention]", attention)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        init_normal(self, generator)

    @torch.no_grad()
    def inherit(self, base: Base) -> None:
        """Start as a copy of a base of the same grid: its attention in every layer; its positions for the
        small map and, side by side, `scale` times each way, for the large one."""
        grid, scale = self.config.grid, self.config.scale
        first = base.positions.weight[base.config.first_frame :]
        self.positions.weight.copy_(first.view(grid, grid, -1).repeat(scale, scale, 1).flatten(0, 1))
        if self.low_positions is not None:
            self.low_positions.weight.copy_(first)
        for channel, block in zip(self.attention, base.blocks):
            channel.load_state_dict(block.attention.state_dict())


class SuperRes(nn.Module):
    """`forward(text, codes)` to logits over the codes of the large map."""

    def __init__(self, base: Base, channel: SuperResChannel):
        super().__init__()
        if channel.config.text_len > base.config.first_frame:
            room = f"{base.config.first_frame} positions of text"
            raise ValueError(f"text_len {channel.config.text_len} does not fit a base of {room}")
        self.base, self.channel, self.config = base, channel, channel.config

    def forward(self, text: Tensor, codes: Tensor) -> Tensor:
        """Logits of every code of the large map.

        text: [B, T], left-padded. codes: if direct, the small map [B, N]; if iterative, the large map [B, S]
        with the base's start id where it is unknown. Returns float32 logits [B, S, V]: at the released size
        288 MB a row, so `hidden` and then `head` for some places at a time may be wiser.
        """
        return self.head(self.hidden(text, codes))

    def head(self, hidden: Tensor) -> Tensor:
        """[B, S, D] to float32 logits [B, S, V]; tied to the embedding of the image codes."""
        return self.base.head(hidden).float()

    def hidden(self, text: Tensor, codes: Tensor) -> Tensor:
        """Like `forward`, up to the last norm: [B, S, D]."""
        c = self.config
        assert text.shape[1] == c.text_len and codes.shape[1] == (c.grid if c.cross else c.side) ** 2
        known, x = self._embed(text, codes)
        tiles, sees, bias = tiles_of(c, x.device, x.dtype), self._sees(text, known), None
        if c.cross is None:
            bias = text_bias(text, c.pad, x.dtype)
        for layer, block in enumerate(self.base.blocks):
            h = block.norm1(x)
            h = self._attend(layer, h, sees, tiles, bias)
            x = x + block.norm3(h)

            h = block.mlp(block.norm2(x))
            x = x + block.norm4(h)
        hidden: Tensor = self.base.norm(x[:, known:])
        return hidden

    def _embed(self, text: Tensor, codes: Tensor) -> tuple[int, Tensor]:
        """How many tokens are known, and all tokens, each with its position: P and [B, P + S, D]."""
        low, high = self.channel.low_positions, self.channel.positions.weight
        known, tables = text, [high]
        large = codes
        if low is not None:
            known, tables = torch.cat((text, codes), 1), [low.weight, high]
            large = codes.new_full((len(codes), len(high)), self.base.config.start)
        maps = torch.cat(tables).expand(len(text), -1, -1)
        positions = self.base.positions(text_ranks(text, self.config.pad))
        x = self.base.embed(torch.cat((known, large), 1)) + torch.cat((positions, maps), 1)
        return known.shape[1], F.dropout(x, self.base.config.dropout, self.training)

    def _sees(self, text: Tensor, known: int) -> Tensor:
        """Bool [B, 1, P, P]: text sees text, the small map sees itself and text. Padding sees all text and is
        seen by padding alone: as in the original, and no row is empty even without any text."""
        real = F.pad(text != self.config.pad, (0, known - text.shape[1]), value=True)
        sees = real[:, None, :] | ~real[:, :, None]
        sees[:, : text.shape[1], text.shape[1] :] = False
        return sees.unsqueeze(1)

    def _attend(self, layer: int, x: Tensor, sees: Tensor, tiles: Tiles, bias: Tensor | None) -> Tensor:
        """Attention of one layer: [B, P + S, D] to the same. `bias` [B, T], if the large map sees text."""
        known = sees.shape[-1]
        dropout = self.base.config.dropout if self.training else 0.0
        base = self.base.blocks[layer].attention
        channel = self.channel.attention[layer] if bias is None else base
        first = self.config.text_len if bias is None else 0  # of the known tokens that the large map sees
        q, k, v = qkv = base.project(x[:, :known])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, dropout_p=dropout)
        seen = attend_tiles(channel.project(x[:, known:]), qkv[1:, :, :, first:], tiles, bias, dropout)
        return torch.cat((base.out(y.transpose(1, 2).flatten(2)), channel.out(seen)), 1)


def due(pattern: Tensor, side: int, number: int) -> Tensor:
    """Which codes of the large map round `number` of iterative super-resolution predicts again, bool [S].

    pattern: integers [h, w], laid over the map again and again; a code is due while its cell is >= `number`.
    """
    rows, columns = (torch.arange(side, device=pattern.device) % size for size in pattern.shape)
    return (pattern[rows[:, None], columns[None, :]] >= number).flatten()

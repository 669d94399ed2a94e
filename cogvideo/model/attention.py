"""The two attention channels of a block (CogVideo section 3.2), for whole sequences and for single steps.

The spatial channel is the attention of the inherited text-to-image model: text and the token's own frame. The
temporal channel has its own weights and looks over frames. Both are the same computation over different
groups of tokens: text keys in front, then the group's, in calls of `scaled_dot_product_attention`, or of
`MatrixAttention` in training on a CPU. The layout says which tokens make a group, a `View` which of them are
in the sequence and where their keys are kept.

Legend: B batch, S frame tokens, T text tokens, G groups of n tokens, H heads, d width of a head, D = H * d.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.layout import Layout
from cogvideo.model.cache import Cache, Channel, ChannelCache
from cogvideo.model.groups import Groups, groups_of
from cogvideo.model.matrix_attention import MatrixAttention, uses_matrices

PADDED = -1e4  # added to scores of padding, where -inf could leave a row without any key


class Attention(nn.Module):
    """One channel of one layer: queries, keys and values as thirds [q | k | v] of one matrix, and the output
    projection. With `qk_norm`, queries and keys are normalised for each head (Dehghani 2023)."""

    def __init__(
        self,
        width: int,
        heads: int,
        qk_norm: bool = False,
        *,
        channel: Channel = "spatial",
        layer: int = 0,
    ):
        super().__init__()
        self.heads = heads
        self.channel = channel
        self.layer = layer
        self.odd = layer % 2 == 1  # torch.compile would specialise on `layer` and compile every layer
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width // heads, bias=False) for _ in range(2 * qk_norm))

    def forward(self, x: Tensor, view: "View") -> tuple[Tensor | None, Tensor]:
        """Attend within `view`: [B, T + S, D] to text [B, T, D] and frames [B, S, D].

        Text is None if the view has none, and in the temporal channel: text has no temporal attention.
        """
        qkv = self.project(x, view.rotary)
        text, frames = view.attend(self, qkv)
        if text is not None:
            text = self.out(text)
        return text, self.out(frames)

    def project(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """[B, S, D] to queries, keys, values [3, B, H, S, d]; `rotary` [2, S, d] rotates queries and keys."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.prepare(qkv, rotary)

    def prepare(self, qkv: Tensor, rotary: Tensor | None) -> Tensor:
        """Queries and keys of [3, B, H, S, d], normalised and rotated as they meet in the scores."""
        if not self.norms and rotary is None:
            return qkv
        q, k, v = qkv  # not by index: its gradient would be summed up in a tensor of all three
        qk = [norm(x) for norm, x in zip(self.norms, (q, k))] or [q, k]
        if rotary is not None:
            qk = [rotate(x, rotary.to(x.dtype)) for x in qk]
        return torch.stack((*qk, v))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary embedding (Su 2021): rotate each pair (x[k], x[k + d / 2]) of x [..., S, d] by an angle of
    its position. `rotary` [2, S, d] holds cosines, and sines whose first half is negated."""
    cosine, sine = rotary
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)


def rotary_table(positions: Tensor, width: int) -> Tensor:
    """Cosines and sines [2, S, width] for `rotate`, of positions [S, 3] (time, row, column).

    Of the width / 2 pairs a quarter encodes time, three eighths the row and three eighths the column, at
    wavelengths from about 6 to 200 positions.
    """
    pairs = width // 2
    shares = (pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8)
    angles = []
    for axis, share in enumerate(shares):
        speed = 32.0 ** -torch.linspace(0, 1, share, device=positions.device)
        angles.append(positions[:, axis : axis + 1].float() * speed)
    angle = torch.cat(angles, 1)  # [S, pairs]
    cosine = angle.cos()
    sine = angle.sin()
    return torch.stack((torch.cat((cosine, cosine), 1), torch.cat((-sine, sine), 1)))


def attend_text(qkv: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """Text attends to text, in both directions: [3, B, H, T, d] to [B, T, D]. `bias` [B, T] is 0, or -inf on
    padding."""
    q, k, v = qkv
    if uses_matrices(qkv) and not dropout:
        padding_bias = bias[:, None, None, :].clamp_min(PADDED).to(q.dtype)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + padding_bias
        y: Tensor = scores.softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None, :], dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)


def attend_groups(
    frames: Tensor,
    text: Tensor,
    groups: Groups,
    bias: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Frame tokens attend to all text and to their group.

    frames: queries, keys, values [3, B, H, S, d]; text: keys, values [2, B, H, T, d]; bias [B, T], added to
    scores of text. Returns [B, S, D].
    """
    if uses_matrices(frames) and not dropout:
        result: Tensor = MatrixAttention.apply(frames, text, bias, groups)  # type: ignore[no-untyped-call]
        return result

    count, _, n, _ = groups.mask.shape
    _, b, h, s, d = frames.shape
    t = text.shape[3]
    x = groups.gather(frames, 3)
    x = x.unflatten(3, (count, n)).transpose(2, 3).flatten(1, 2)  # [3, B*G, H, n, d]
    if count > 1:
        text = text.repeat_interleave(count, 1)  # [2, B*G, H, T, d]
    q = x[0]
    k, v = torch.cat((text, x[1:]), 3)

    text_mask = bias[:, None, None, None, :].expand(b, count, 1, n, -1)
    frame_mask = groups.mask.expand(b, count, 1, n, n)
    mask = torch.cat((text_mask, frame_mask), -1).flatten(0, 1)  # [B*G, 1, n, T+n]

    chunks = []
    for start, end, seen, _ in groups.chunks:
        rows = slice(start, end)
        keys = slice(0, t + seen)
        y = F.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], mask[:, :, rows, keys], dropout
        )
        chunks.append(y)
    y = chunks[0] if len(chunks) == 1 else torch.cat(chunks, 2)  # [B*G, H, n, d]
    y = y.view(b, count, h, n, d).transpose(2, 3).reshape(b, s, h * d)  # group order
    return groups.restore(y, 1)


def attend_step(
    qkv: Tensor, cache: ChannelCache, layer: int, runs: Sequence[Sequence[int]], bias: Tensor
) -> Tensor:
    """New tokens at some laid positions attend to what the cache holds for each: [3, B, H, m, d] to
    [B, m, D].

    runs: the positions, grouped by what they see (`ChannelCache.split`). bias [B * H, 1, L]: added to the
    scores, text first, zeros after. Scores, softmax and mean are three calls and not
    `scaled_dot_product_attention`, which for a single query shares the keys of the whole batch out over the
    threads: its sums depend on the batch and on the number of threads.
    """
    _, b, h, m, d = qkv.shape
    qkv = qkv.flatten(1, 2)  # [3, B * H, m, d]
    outputs = []
    for positions, new in zip(runs, qkv.split([len(run) for run in runs], 2)):
        k, v = cache.append(layer, positions, new[1:])  # each [B * H, seen, d]
        mask = bias.narrow(2, 0, k.shape[1])
        scores = torch.baddbmm(mask, new[0], k.transpose(1, 2), alpha=d**-0.5)  # [B * H, m, seen]
        outputs.append(torch.bmm(scores.softmax(-1), v))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return y.view(b, h, m, d).transpose(1, 2).flatten(2)


# -- views
#
# A layer runs in three situations: over a whole sequence (training), over a prompt whose keys are to be
# cached, and over single new tokens. What a token attends to, and where its keys go, differs between them;
# norms, projections, gate and MLP do not. So a block is written once, and hands its queries, keys and values
# to the view of the situation.


class View(Protocol):
    """What the tokens of one forward attend to, in both channels of all layers."""

    @property
    def rotary(self) -> Tensor | None:
        """[2, T + S, d] rotations of queries and keys (`rotary_table`), if there are any."""
        ...

    def attend(self, attention: Attention, qkv: Tensor) -> tuple[Tensor | None, Tensor]:
        """Queries, keys, values [3, B, H, T + S, d] of a channel to the results of its text [B, T, D] and of
        its frames [B, S, D]."""
        ...


@dataclass(frozen=True)
class SequenceView:
    """Text and the first whole frames of a layout, all at once."""

    layout: Layout  # of the frames in the sequence
    window: int  # of the temporal channel; odd layers shift theirs
    bias: Tensor  # [B, T] added to the scores of text
    rotary: Tensor | None = None
    boost: float = 0.0  # the part of the bias that is the boost of text
    dropout: float = 0.0

    def attend(self, attention: Attention, qkv: Tensor) -> tuple[Tensor | None, Tensor]:
        text, frames = qkv.tensor_split((self.bias.shape[1],), 3)  # [3, B, H, T, d], [3, B, H, S, d]
        temporal = attention.channel == "temporal"
        text_result = None if temporal else attend_text(text, self.bias, self.dropout)
        if not self.layout.frames:
            return text_result, frames[0].transpose(1, 2).flatten(2)  # [B, 0, D]

        shifted = bool(self.window) and attention.odd
        groups = groups_of(self.layout, attention.channel, self.window, shifted, qkv.device, self.bias.dtype)
        unboosted = self.layout.reference and temporal  # the original boosts text only in single steps there
        bias = self.bias - self.boost if unboosted else self.bias
        return text_result, attend_groups(frames, text[1:], groups, bias, self.dropout)


@dataclass(frozen=True)
class PromptView(SequenceView):
    """The same; keys and values stay in a cache for the steps that follow."""

    cache: Cache = field(kw_only=True)

    def attend(self, attention: Attention, qkv: Tensor) -> tuple[Tensor | None, Tensor]:
        self.cache.write(attention.channel, attention.layer, qkv)
        return super().attend(attention, qkv)


class StepView:
    """One new token a row at some laid positions, or several that do not depend on each other."""

    def __init__(self, cache: Cache, positions: Sequence[int]):
        self.cache = cache
        self.rotary = None if cache.rotary is None else cache.rotary[:, positions]
        self.runs = {name: channel.split(positions) for name, channel in cache.channels.items()}

    def attend(self, attention: Attention, qkv: Tensor) -> tuple[Tensor | None, Tensor]:
        channel = self.cache.channels[attention.channel]
        runs = self.runs[attention.channel][attention.layer % 2]
        return None, attend_step(qkv, channel, attention.layer, runs, self.cache.bias)

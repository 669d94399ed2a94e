"""Which frame tokens attend together in a full pass, as tensors.

`Layout.groups` cuts a sequence into groups of equal size; here are the indices that gather tokens into
groups, the masks, and which keys a chunk of queries can skip.

Shapes: S frame tokens, G groups of n tokens.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cogvideo.layout import Layout

CHUNK = 192  # queries that attend together: enough to fill a matrix, few enough to skip keys that none sees


class Chunk(NamedTuple):
    """Queries `start` to `end` - 1 of every group, and the keys that they need."""

    start: int
    end: int
    seen: int  # no query sees a key after the first `seen`
    unmasked: int  # every query sees the first `unmasked` keys


@dataclass(frozen=True)
class Groups:
    index: Tensor  # [G * n] laid positions, group by group
    inverse: Tensor  # [S] the inverse permutation
    mask: Tensor  # [G, 1, n, n] 0 or -inf
    chunks: tuple[Chunk, ...]
    is_identity: bool  # index is the identity: no token need be moved

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Tokens in laid order to group order."""
        return x if self.is_identity else x.index_select(dim, self.index)

    def restore(self, x: Tensor, dim: int) -> Tensor:
        """Tokens in group order to laid order."""
        return x if self.is_identity else x.index_select(dim, self.inverse)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached: must not be an inference tensor, since training uses it
def groups_of(
    layout: Layout, channel: str, window: int, shifted: bool, device: torch.device, dtype: torch.dtype
) -> Groups:
    groups = layout.groups(channel, window, shifted)  # [G, n]
    sees = layout.sees(channel, window, shifted)[groups[:, :, None], groups[:, None, :]]  # [G, n, n]
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, float("-inf")).unsqueeze(1)

    chunks = []
    start = 0
    for rows in sees.split(CHUNK, 1):  # [G, rows, n]
        seen = int(rows.any(1).any(0).nonzero().max()) + 1
        unmasked = int(rows.all(1).all(0).long().cumprod(0).sum())
        chunks.append(Chunk(start, start + rows.shape[1], seen, unmasked))
        start += rows.shape[1]

    index = groups.flatten()
    is_identity = bool((index == torch.arange(len(index))).all())
    inverse = index.argsort()
    return Groups(index.to(device), inverse.to(device), mask.to(device), tuple(chunks), is_identity)

"""Batches of codes from clips that recur, each encoded once.

Sample k of a run is a use of a clip that other samples use as well, with a caption of its own. Which clip it
is depends on (seed, k) alone; codes are only remembered.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader

from cogvideo.data.cut import Cut, Source
from cogvideo.data.loader import Batch, Cuts, Found
from cogvideo.model.vqvae import to_pictures


@dataclass(frozen=True)
class Reuse:
    """Every clip is used `times` times; about `pool` clips take turns.

    Each place of the batch of all ranks has clips of its own, so the same rank meets a clip again, and each
    step one place in `times` begins a new clip. Uses of a clip are far from each other: they are in
    different blocks, each an order of its own.
    """

    times: int
    pool: int = 16_384

    def clip(self, seed: int, step: int, place: int, batch: int) -> tuple[int, int]:
        """The clip at a place of the batch: the block that it belongs to, and its number."""
        turn, age = step // self.times, (step + place) % self.times
        size = max(1, self.pool // (self.times * batch))  # clips of a place in a block
        now, at = divmod(turn, size)
        block = now + self.times - 1 - age  # older blocks come again; the first ones are less often there
        chosen = int(_block_order(seed, block, age, size)[at])
        return block, (block * size + chosen) * batch + place

    def oldest(self, step: int, batch: int) -> int:
        """The block before which no clip comes again from this step on."""
        return step // self.times // max(1, self.pool // (self.times * batch))


@lru_cache(64)
def _block_order(seed: int, block: int, age: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, block, age, 4)).permutation(size)


@dataclass(frozen=True)
class _Kept:
    """What is remembered of a clip."""

    index: int  # of its recording
    duration: float
    codes: torch.Tensor  # int32 [F, N]
    cover: torch.Tensor | None


def recurring(
    source: Source,
    how: Cut,
    batch: int,
    reuse: Reuse,
    encode: Callable[[torch.Tensor], torch.Tensor],
    *,
    seed: int,
    step: int = 0,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Like `batches`, with clips that recur, as codes: `encode` turns clips [B, F, 3, size, size] of the
    first size into them [B, F, N], and is called for clips that are not remembered."""
    planned: deque[tuple[int, list[tuple[int, int]]]] = deque()  # steps that the data loader works on

    def missing() -> Iterator[list[int]]:
        asked: dict[int, set[int]] = {}
        k = step
        while True:
            places = range(rank * batch, (rank + 1) * batch)
            clips = [reuse.clip(seed, k, place, ranks * batch) for place in places]
            oldest = reuse.oldest(k, ranks * batch)
            asked = {block: those for block, those in asked.items() if block >= oldest}
            new = [number for block, number in clips if number not in asked.setdefault(block, set())]
            for block, number in clips:
                asked[block].add(number)
            planned.append((k, clips))
            yield new
            k += 1

    kept: dict[int, dict[int, _Kept]] = {}
    clips_of = DataLoader(
        Cuts(source, how, seed), batch_sampler=missing(), num_workers=workers, collate_fn=list
    )
    for found in clips_of:
        k, clips = planned.popleft()
        oldest = reuse.oldest(k, ranks * batch)
        kept = {block: those for block, those in kept.items() if block >= oldest}
        blocks = {number: block for block, number in clips}
        skipped: dict[str, str] = {}
        for one, codes in zip(found, _encoded(found, encode)):
            number, sample, passed, index = one
            cover = None if sample.cover is None else torch.from_numpy(sample.cover)
            kept.setdefault(blocks[number], {})[number] = _Kept(index, sample.duration, codes, cover)
            skipped |= passed
        rows = [kept[block][number] for block, number in clips]
        numbers = [(k * ranks + rank) * batch + i for i in range(batch)]
        captions = [
            source.caption(row.index, np.random.default_rng((seed, number, 3)))
            for row, number in zip(rows, numbers)
        ]
        covers = [row.cover for row in rows if row.cover is not None]
        yield Batch(
            numbers,
            captions,
            [row.duration for row in rows],
            (),
            torch.stack(covers) if covers else None,
            skipped,
            torch.stack([row.codes for row in rows]).long(),
        )


def _encoded(found: list[Found], encode: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
    """int32 codes [F, N] of new clips, one by one: so they do not depend on what else is new."""
    for _, sample, _, _ in found:
        yield encode(to_pictures(sample.frames[0])[None])[0].int()

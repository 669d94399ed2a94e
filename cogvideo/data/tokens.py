"""Batches of codes from clips that recur, each encoded once.

Sample k of a run uses a clip that other samples use as well, with a caption of its own. Which clip it is
depends on (seed, k) alone; remembered codes only save time.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader

from cogvideo.data.cut import Cut, Source
from cogvideo.data.loader import Batch, Cuts, Found, is_dropped
from cogvideo.model.vqvae import to_images


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
class _Clip:
    """What is remembered of a clip."""

    index: int  # of its video
    duration: float
    codes: torch.Tensor  # int32 [F, N]
    cover: torch.Tensor | None


Clips = list[tuple[int, int]]  # of a batch: block and number of each


class _Plan:
    """The clips of each step of one rank, and which of them are new. It runs ahead of the training, since the
    data loader does."""

    def __init__(self, reuse: Reuse, seed: int, step: int, batch: int, rank: int, ranks: int):
        self.reuse = reuse
        self.seed = seed
        self.step = step
        self.all = batch * ranks
        self.positions = range(rank * batch, (rank + 1) * batch)  # in the batch of all ranks
        self.planned: deque[tuple[int, Clips]] = deque()  # by step

    def missing(self) -> Iterator[list[int]]:
        """The numbers of each step's new clips."""
        asked: dict[int, set[int]] = {}
        k = self.step
        while True:
            clips = [self.reuse.clip(self.seed, k, position, self.all) for position in self.positions]
            oldest = self.reuse.oldest(k, self.all)
            asked = {block: those for block, those in asked.items() if block >= oldest}
            new = [number for block, number in clips if number not in asked.setdefault(block, set())]
            for block, number in clips:
                asked[block].add(number)
            self.planned.append((k, clips))
            yield new
            k += 1

    def next(self) -> tuple[int, Clips]:
        """The next step, and the block and number of each of its clips."""
        return self.planned.popleft()


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
    drop: float = 0.0,
) -> Iterator[Batch]:
    """Like `batches`, with clips that recur, as codes. `encode` turns clips [B, F, 3, size, size] of the
    first size into codes [B, F, N]; it is called for clips that are not remembered."""
    plan = _Plan(reuse, seed, step, batch, rank, ranks)
    loader = DataLoader(
        Cuts(source, how, seed), batch_sampler=plan.missing(), num_workers=workers, collate_fn=list
    )
    known: dict[int, dict[int, _Clip]] = {}  # by block, then by number
    for found in loader:
        k, clips = plan.next()
        oldest = reuse.oldest(k, ranks * batch)
        known = {block: those for block, those in known.items() if block >= oldest}
        blocks = {number: block for block, number in clips}
        skipped: dict[str, str] = {}
        for one, codes in zip(found, _encoded(found, encode)):
            number, sample, passed, index = one
            cover = None if sample.cover is None else torch.from_numpy(sample.cover)
            known.setdefault(blocks[number], {})[number] = _Clip(index, sample.duration, codes, cover)
            skipped |= passed

        rows = [known[block][number] for block, number in clips]
        numbers = [(k * ranks + rank) * batch + i for i in range(batch)]
        captions = [_caption(source, row.index, seed, n, drop) for row, n in zip(rows, numbers)]
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


def _caption(source: Source, index: int, seed: int, k: int, drop: float) -> str:
    """A caption of a video for sample k: each use of a clip has its own, or none."""
    if is_dropped(seed, k, drop):
        return ""
    return source.caption(index, np.random.default_rng((seed, k, 3)))


def _encoded(found: list[Found], encode: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
    """int32 codes [F, N] of new clips, one by one: so they do not depend on what else is new."""
    for _, sample, _, _ in found:
        yield encode(to_images(sample.frames[0])[None])[0].int()

"""Batches of codes from clips that recur, each encoded once.

Sample k of a run is a use of a clip that other samples use as well, with a caption of its own. Which clip it
is depends on (seed, k) alone; codes are only remembered.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from cogvideo.data.cut import Cut, Sample, Source
from cogvideo.data.loader import RECAPTION, Batch, Cuts, is_dropped
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
def _block_order(seed: int, block: int, age: int, size: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, block, age, 4)).permutation(size)


@dataclass(frozen=True)
class _Encoded:
    """What is remembered of a clip."""

    index: int  # of its video
    duration: float
    codes: torch.Tensor  # int32 [F, N]
    cover: torch.Tensor | None


Encode = Callable[[torch.Tensor], torch.Tensor]  # clips [B, F, 3, size, size] to codes [B, F, N]
Clips = list[tuple[int, int]]  # of a batch: block and number of each


def recurring(
    source: Source,
    how: Cut,
    batch: int,
    reuse: Reuse,
    encode: Encode,
    *,
    seed: int,
    step: int = 0,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    drop: float = 0.0,
) -> Iterator[Batch]:
    """Like `batches`, with clips that recur, as codes: those of the first size of the cut. `encode` is called
    for clips that are not remembered."""
    planned: deque[tuple[int, Clips]] = deque()  # steps that the data loader works on

    def missing() -> Iterator[list[int]]:
        asked: dict[int, set[int]] = {}
        k = step
        while True:
            places = range(rank * batch, (rank + 1) * batch)
            clips = [reuse.clip(seed, k, place, ranks * batch) for place in places]
            oldest = reuse.oldest(k, ranks * batch)
            asked = {block: numbers for block, numbers in asked.items() if block >= oldest}
            new = [number for block, number in clips if number not in asked.setdefault(block, set())]
            for block, number in clips:
                asked[block].add(number)
            planned.append((k, clips))
            yield new
            k += 1

    memory: dict[int, dict[int, _Encoded]] = {}
    cuts = Cuts(source, how, seed)
    for found in DataLoader(cuts, batch_sampler=missing(), num_workers=workers, collate_fn=list):
        k, clips = planned.popleft()
        oldest = reuse.oldest(k, ranks * batch)
        memory = {block: those for block, those in memory.items() if block >= oldest}
        blocks = {number: block for block, number in clips}
        skipped: dict[str, str] = {}
        for number, sample, passed, index in found:
            memory.setdefault(blocks[number], {})[number] = _encoded(index, sample, encode)
            skipped |= passed

        rows = [memory[block][number] for block, number in clips]
        numbers = [(k * ranks + rank) * batch + i for i in range(batch)]
        captions = [_caption(source, row.index, seed, n, drop) for row, n in zip(rows, numbers)]
        covers = [row.cover for row in rows if row.cover is not None]
        yield Batch(
            numbers,
            captions,
            durations=[row.duration for row in rows],
            frames=(),
            cover=torch.stack(covers) if covers else None,
            skipped=skipped,
            codes=torch.stack([row.codes for row in rows]).long(),
        )


def _encoded(index: int, sample: Sample, encode: Encode) -> _Encoded:
    """A new clip, encoded by itself: so its codes do not depend on what else is new."""
    codes = encode(to_pictures(sample.frames[0])[None])[0].int()  # [F, N]
    cover = None if sample.cover is None else torch.from_numpy(sample.cover)
    return _Encoded(index, sample.duration, codes, cover)


def _caption(source: Source, index: int, seed: int, number: int, drop: float) -> str:
    """A caption of the sample's own for a video, or "" if it is dropped."""
    if is_dropped(seed, number, drop):
        return ""
    return source.caption(index, np.random.default_rng((seed, number, RECAPTION)))

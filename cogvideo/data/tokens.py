"""Batches of codes from clips that recur, each encoded once.

Sample k of a run uses a clip that other samples use as well, with its own caption. Which clip it is
depends on (seed, k) alone; remembered codes only save time.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from cogvideo.data.cut import ClipSpec, Source
from cogvideo.data.loader import Batch, ClipDataset, LoadedSample, is_dropped
from cogvideo.model.vqvae import to_images

T = TypeVar("T")


@dataclass(frozen=True)
class Reuse:
    """Every clip is used `times` times; about `pool` clips take turns.

    Each position of the global batch has its own clips, so a clip always returns to the same process. A
    position's clips come in blocks. All uses of a block but the first run while later blocks begin, each in a
    new order, so uses of a clip are far apart. With times = 2 and blocks of three clips (abc, def, ghi), one
    position meets

        step    0 1 2 3 4 5   6 7 8 9 ...
        new     d   f   e     i   g         first use of block 1, then of block 2
        again     b   a   c     f   d       second use of block 0, then of block 1

    The first blocks of a run are used less often.
    """

    times: int
    pool: int = 16_384

    def clip(self, seed: int, step: int, position: int, batch: int) -> tuple[int, int]:
        """The clip at a position of the global batch: its block and its number."""
        size = self._block_size(batch)
        use = (step + position) % self.times  # 0: first use
        block_now, index = divmod(step // self.times, size)
        block = block_now + self.times - 1 - use
        member = int(_block_order(seed, block, use, size)[index])
        return block, (block * size + member) * batch + position

    def oldest(self, step: int, batch: int) -> int:
        """The oldest block that is still used at this step or later."""
        return step // self.times // self._block_size(batch)

    def _block_size(self, batch: int) -> int:
        """Clips of a block, of one position."""
        return max(1, self.pool // (self.times * batch))


@lru_cache(64)
def _block_order(seed: int, block: int, use: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, block, use, 4)).permutation(size)


@dataclass(frozen=True)
class _Clip:
    """What is remembered of a clip."""

    index: int  # of its video
    duration: float
    codes: torch.Tensor  # int32 [F, N]
    cover: torch.Tensor | None


ClipIds = list[tuple[int, int]]  # of a batch: block and number of each clip


class _Plan:
    """The clips of each step of one process, and which of them are new.

    The data loader pulls from `missing`, several steps ahead if it has workers; `next` returns the steps in
    the same order when their clips have arrived.
    """

    def __init__(self, reuse: Reuse, seed: int, step: int, batch: int, rank: int, ranks: int):
        self.reuse = reuse
        self.seed = seed
        self.step = step
        self.global_batch = batch * ranks
        self.positions = range(rank * batch, (rank + 1) * batch)  # in the global batch
        self.planned: deque[tuple[int, ClipIds]] = deque()  # by step

    def missing(self) -> Iterator[list[int]]:
        """The numbers of each step's new clips."""
        requested: dict[int, set[int]] = {}  # by block
        step = self.step
        while True:
            clips = []
            for position in self.positions:
                clips.append(self.reuse.clip(self.seed, step, position, self.global_batch))
            _forget(requested, self.reuse.oldest(step, self.global_batch))

            new = []
            for block, number in clips:
                if number not in requested.setdefault(block, set()):
                    new.append(number)
            for block, number in clips:
                requested[block].add(number)

            self.planned.append((step, clips))
            yield new
            step += 1

    def next(self) -> tuple[int, ClipIds]:
        """The next step, and the block and number of each of its clips."""
        return self.planned.popleft()


def _forget(blocks: dict[int, T], oldest: int) -> None:
    """Remove the blocks before `oldest`."""
    for block in [block for block in blocks if block < oldest]:
        del blocks[block]


def recurring(
    source: Source,
    spec: ClipSpec,
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
    dataset = ClipDataset(source, spec, seed)
    loader = DataLoader(dataset, batch_sampler=plan.missing(), num_workers=workers, collate_fn=list)
    memory: dict[int, dict[int, _Clip]] = {}  # by block, then by number

    for new in loader:
        k, clips = plan.next()
        _forget(memory, reuse.oldest(k, ranks * batch))
        blocks = {number: block for block, number in clips}
        skipped: dict[str, str] = {}
        for loaded, codes in zip(new, _encoded(new, encode)):
            memory.setdefault(blocks[loaded.number], {})[loaded.number] = _remembered(loaded, codes)
            skipped |= loaded.skipped

        rows = [memory[block][number] for block, number in clips]
        numbers = [(k * ranks + rank) * batch + i for i in range(batch)]
        captions = [_caption(source, row.index, seed, n, drop) for row, n in zip(rows, numbers)]
        covers = [row.cover for row in rows if row.cover is not None]
        yield Batch(
            numbers=numbers,
            captions=captions,
            durations=[row.duration for row in rows],
            frames=(),
            cover=torch.stack(covers) if covers else None,
            skipped=skipped,
            codes=torch.stack([row.codes for row in rows]).long(),
        )


def _remembered(loaded: LoadedSample, codes: torch.Tensor) -> _Clip:
    sample = loaded.sample
    cover = None if sample.cover is None else torch.from_numpy(sample.cover)
    return _Clip(loaded.video_index, sample.duration, codes, cover)


def _caption(source: Source, index: int, seed: int, k: int, drop: float) -> str:
    """A caption of a video for sample k: each use of a clip has its own, or none."""
    if is_dropped(seed, k, drop):
        return ""
    return source.caption(index, np.random.default_rng((seed, k, 3)))


def _encoded(
    new: list[LoadedSample], encode: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[torch.Tensor]:
    """int32 codes [F, N] of new clips, one by one: so they do not depend on what else is new."""
    for loaded in new:
        stored = loaded.sample.codes
        if stored is not None:
            yield torch.from_numpy(stored.astype(np.int32))
        else:
            yield encode(to_images(loaded.sample.frames[0])[None])[0].int()

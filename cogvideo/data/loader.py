"""Batches without end, the same ones for the same seed: shuffled, split by rank, resumable from a single
number.

Sample k of a run is a function of (seed, k) alone, so the state of the loader is the step it has reached. Its
random numbers are of a stream of their own, since a source may have drawn recording k from (seed, k). A
recording that cannot be used (missing, damaged, too short) is passed over and told of; the next one of the
epoch's order takes its place.

Clips may recur (`Reuse`): sample k is then a use of a clip that other samples use as well, with a caption of
its own. Which clip it is, is a function of k, too; what was encoded is only remembered.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cogvideo.data.clips import Cut, Sample, Source, cut
from cogvideo.vqvae import to_pictures


@dataclass(frozen=True)
class Batch:
    numbers: list[int]  # of the samples, counted from the start of the run
    captions: list[str]
    durations: list[float]
    frames: tuple[torch.Tensor, ...]  # for each size: float [B, F, 3, size, size] in [0, 1]
    cover: torch.Tensor | None = None  # [B, F, cells, cells] share of each that the object covers
    skipped: dict[str, str] = field(default_factory=dict)  # recordings that were passed over, and why
    codes: torch.Tensor | None = None  # [B, F, N], of clips that recur, which come without frames

    @property
    def device(self) -> torch.device:
        return self.frames[0].device if self.codes is None else self.codes.device


class _Cuts(Dataset):
    """Clip k of an endless run."""

    def __init__(self, source: Source, how: Cut, seed: int):
        self.source, self.how, self.seed = source, how, seed

    def __getitem__(self, k: int) -> "_Found":
        rng, skipped = np.random.default_rng((self.seed, k, 1)), dict[str, str]()
        if self.source.count is None:
            return k, cut(self.source[k], self.how, rng), {}, k
        epoch, place = divmod(k, self.source.count)  # each epoch is an order of its own
        order = _order(self.seed, epoch, self.source.count)
        for index in (int(order[(place + i) % len(order)]) for i in range(len(order))):
            try:
                return k, cut(self.source[index], self.how, rng), skipped, index
            except ValueError as error:
                skipped[self.source.name(index)] = str(error)
        why = "\n".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise ValueError(f"none of the {self.source.count} recordings can be used: {why}")


_Found = tuple[int, Sample, dict[str, str], int]  # number, clip, what was passed over, index of the recording


@lru_cache(2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def batches(
    source: Source,
    how: Cut,
    batch: int,
    *,
    seed: int,
    step: int = 0,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches of `batch` clips for this rank, from `step` on; `ranks` ranks together see each sample once."""

    def mine() -> Iterator[list[int]]:
        k = step
        while True:
            first = (k * ranks + rank) * batch
            yield list(range(first, first + batch))
            k += 1

    return iter(
        DataLoader(_Cuts(source, how, seed), batch_sampler=mine(), num_workers=workers, collate_fn=_collate)
    )


def _collate(found: list[_Found]) -> Batch:
    numbers, samples, skips, _ = zip(*found)
    frames = tuple(to_pictures(np.stack(same_size)) for same_size in zip(*(s.frames for s in samples)))
    covers = [s.cover for s in samples if s.cover is not None]
    cover = torch.from_numpy(np.stack(covers)) if covers else None
    captions, durations = [s.caption for s in samples], [s.duration for s in samples]
    skipped = {name: why for one in skips for name, why in one.items()}
    return Batch(list(numbers), captions, durations, frames, cover, skipped)


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
        _Cuts(source, how, seed), batch_sampler=missing(), num_workers=workers, collate_fn=list
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
        captions = [source.caption(row.index, np.random.default_rng((seed, number, 3)))
                    for row, number in zip(rows, numbers)]
        covers = [row.cover for row in rows if row.cover is not None]
        yield Batch(numbers, captions, [row.duration for row in rows], (),
                    torch.stack(covers) if covers else None, skipped,
                    torch.stack([row.codes for row in rows]).long())


def _encoded(found: list[_Found], encode: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
    """int32 codes [F, N] of new clips, one by one: so they do not depend on what else is new."""
    for _, sample, _, _ in found:
        yield encode(to_pictures(sample.frames[0])[None])[0].int()


def read_captions(source: Source, count: int, seed: int) -> Iterator[str]:
    """Captions of a source, the same for the same seed: `count` of one without end, else four of every
    recording, but no more than `count`."""
    for k in range(count if source.count is None else min(count, 4 * source.count)):
        index = k if source.count is None else k % source.count
        yield source.caption(index, np.random.default_rng((seed, k, 2)))

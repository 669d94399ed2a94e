"""Endless batches of clips, the same for the same seed: shuffled, split by rank, resumable from one number.

Sample k of a run depends on (seed, k) alone, so the state of the loader is the step that it has reached. Its
random numbers are streams of their own, since a source may have drawn video k from (seed, k). A video that
cannot be used (missing, damaged, too short) is skipped and reported; the next one of the epoch's order takes
its place.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from cogvideo.data.cut import Cut, Sample, Source, cut
from cogvideo.model.vqvae import to_pictures

CUT, TEXT_MODEL, RECAPTION, DROP = 1, 2, 3, 5  # streams of random numbers


@dataclass(frozen=True)
class Batch:
    numbers: list[int]  # of the samples, counted from the start of the run
    captions: list[str]  # "" where the caption is dropped
    durations: list[float]
    frames: tuple[torch.Tensor, ...]  # for each size: float [B, F, 3, size, size] in [0, 1]
    cover: torch.Tensor | None = None  # [B, F, cells, cells] share of each that the object covers
    skipped: dict[str, str] = field(default_factory=dict)  # videos that are not used, and why
    codes: torch.Tensor | None = None  # [B, F, N], of clips that recur, which come without frames

    @property
    def device(self) -> torch.device:
        return self.frames[0].device if self.codes is None else self.codes.device


Found = tuple[int, Sample, dict[str, str], int]  # number, clip, what was skipped, index of the video


class Cuts(Dataset[Found]):
    """Clip k of an endless run."""

    def __init__(self, source: Source, how: Cut, seed: int):
        self.source = source
        self.how = how
        self.seed = seed

    def __getitem__(self, k: int) -> Found:
        rng = np.random.default_rng((self.seed, k, CUT))
        if self.source.count is None:
            return k, cut(self.source[k], self.how, rng), {}, k

        epoch, first = divmod(k, self.source.count)  # each epoch is an order of its own
        order = _order(self.seed, epoch, self.source.count)
        skipped: dict[str, str] = {}
        for i in range(len(order)):
            index = int(order[(first + i) % len(order)])
            try:
                return k, cut(self.source[index], self.how, rng), skipped, index
            except ValueError as error:
                skipped[self.source.name(index)] = str(error)
        why = "\n".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise ValueError(f"none of the {self.source.count} videos can be used: {why}")


@lru_cache(2)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def is_dropped(seed: int, number: int, share: float) -> bool:
    """Whether the caption of a sample is dropped, for classifier-free guidance: of about `share` of them, by
    the sample's own random number."""
    return share > 0 and np.random.default_rng((seed, number, DROP)).random() < share


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
    drop: float = 0.0,
) -> Iterator[Batch]:
    """Batches of `batch` clips for this rank, from `step` on; `ranks` ranks together see each sample once. A
    share `drop` of the captions is dropped."""

    def numbers() -> Iterator[list[int]]:
        k = step
        while True:
            first = (k * ranks + rank) * batch
            yield list(range(first, first + batch))
            k += 1

    cuts = Cuts(source, how, seed)
    for found in DataLoader(cuts, batch_sampler=numbers(), num_workers=workers, collate_fn=_collate):
        captions = [
            "" if is_dropped(seed, number, drop) else caption
            for number, caption in zip(found.numbers, found.captions)
        ]
        yield replace(found, captions=captions)


def _collate(found: list[Found]) -> Batch:
    numbers, samples, skips, _ = zip(*found)
    sizes = zip(*(sample.frames for sample in samples))
    frames = tuple(to_pictures(np.stack(clips)) for clips in sizes)
    covers = [sample.cover for sample in samples if sample.cover is not None]
    cover = torch.from_numpy(np.stack(covers)) if covers else None
    skipped: dict[str, str] = {}
    for one in skips:
        skipped |= one
    captions = [sample.caption for sample in samples]
    durations = [sample.duration for sample in samples]
    return Batch(list(numbers), captions, durations, frames, cover, skipped)


def read_captions(source: Source, count: int, seed: int) -> Iterator[str]:
    """Captions of a source, the same for the same seed: `count` of one without end, else four of every video,
    but no more than `count`."""
    if source.count is not None:
        count = min(count, 4 * source.count)
    for k in range(count):
        index = k if source.count is None else k % source.count
        yield source.caption(index, np.random.default_rng((seed, k, TEXT_MODEL)))

"""Batches without end, the same ones for the same seed: shuffled, split by rank, resumable from a single
number.

Sample k of a run is a function of (seed, k) alone, so the state of the loader is the step it has reached. Its
random numbers have their own streams, since a source may have drawn video k from (seed, k):
    (seed, k, 1)    the clip
    (seed, k, 2)    captions without clips, for the text model
    (seed, k, 3)    the caption of a clip that recurs
    (seed, k, 4)    whether the caption is dropped, for classifier-free guidance
A video that cannot be used (missing, damaged, too short) is skipped and reported; the next one of the
epoch's order takes its place.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cogvideo.data.cut import ClipSpec, Sample, Source, cut_clip
from cogvideo.model.vqvae import to_images


@dataclass(frozen=True)
class Batch:
    numbers: list[int]  # of the samples, counted from the start of the run
    captions: list[str]  # "" where it was dropped
    durations: list[float]
    frames: tuple[torch.Tensor, ...]  # for each size: float [B, F, 3, size, size] in [0, 1]
    cover: torch.Tensor | None = None  # [B, F, cells, cells] share of each that the object covers
    skipped: dict[str, str] = field(default_factory=dict)  # videos skipped, and why
    codes: torch.Tensor | None = None  # [B, F, N], of clips that recur, or of stored codes; without frames

    @property
    def device(self) -> torch.device:
        return self.frames[0].device if self.codes is None else self.codes.device


class LoadedSample(NamedTuple):
    """A sample with its number in the run, the index of its video, and the videos that were skipped for
    it."""

    number: int
    sample: Sample
    skipped: dict[str, str]  # names, and why
    video_index: int


class ClipDataset(Dataset[LoadedSample]):
    """The samples of an endless run, by number; a share `drop` of them has an empty caption."""

    def __init__(self, source: Source, spec: ClipSpec, seed: int, drop: float = 0.0):
        self.source = source
        self.spec = spec
        self.seed = seed
        self.drop = drop

    def __getitem__(self, k: int) -> LoadedSample:
        rng = np.random.default_rng((self.seed, k, 1))
        if self.source.count is None:
            return LoadedSample(k, self._sample(k, k, rng), {}, k)

        epoch, position = divmod(k, self.source.count)
        order = _order(self.seed, epoch, self.source.count)  # each epoch has its own
        skipped: dict[str, str] = {}
        for i in range(len(order)):
            index = int(order[(position + i) % len(order)])
            try:
                return LoadedSample(k, self._sample(k, index, rng), skipped, index)
            except ValueError as error:
                skipped[self.source.name(index)] = str(error)
        why = "\n".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise ValueError(f"none of the {self.source.count} videos can be used: {why}")

    def _sample(self, k: int, index: int, rng: np.random.Generator) -> Sample:
        sample = cut_clip(self.source[index], self.spec, rng)
        return replace(sample, caption="") if is_dropped(self.seed, k, self.drop) else sample


def is_dropped(seed: int, k: int, share: float) -> bool:
    """Whether sample k of a run loses its caption; a share of all samples does."""
    return bool(np.random.default_rng((seed, k, 4)).random() < share)


@lru_cache(2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def batches(
    source: Source,
    spec: ClipSpec,
    batch: int,
    *,
    seed: int,
    step: int = 0,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    drop: float = 0.0,
) -> Iterator[Batch]:
    """Batches of `batch` clips for this rank, starting at `step`; `ranks` ranks together see each sample
    once. A share `drop` of the captions is empty. ValueError if no video can be used."""

    dataset = ClipDataset(source, spec, seed, drop)
    numbers = _sample_numbers(batch, step, rank, ranks)
    return iter(DataLoader(dataset, batch_sampler=numbers, num_workers=workers, collate_fn=_collate))


def _sample_numbers(batch: int, step: int, rank: int, ranks: int) -> Iterator[list[int]]:
    """The samples of this rank for each step, from `step` on."""
    while True:
        first = (step * ranks + rank) * batch
        yield list(range(first, first + batch))
        step += 1


def _collate(loaded: list[LoadedSample]) -> Batch:
    samples = [row.sample for row in loaded]
    sizes = zip(*(sample.frames for sample in samples))
    covers = [sample.cover for sample in samples if sample.cover is not None]
    codes = [sample.codes for sample in samples if sample.codes is not None]
    skipped: dict[str, str] = {}
    for row in loaded:
        skipped |= row.skipped
    return Batch(
        numbers=[row.number for row in loaded],
        captions=[sample.caption for sample in samples],
        durations=[sample.duration for sample in samples],
        frames=tuple(to_images(np.stack(same_size)) for same_size in sizes),
        cover=torch.from_numpy(np.stack(covers)) if covers else None,
        skipped=skipped,
        codes=torch.from_numpy(np.stack(codes)).long() if codes else None,
    )


def by_turns(first: Batch, second: Batch) -> Batch:
    """Two batches as one: a clip of each by turns, then the rest of the longer one. The samples get even and
    odd numbers. Cover is kept if both have it."""
    numbers = [2 * k for k in first.numbers] + [2 * k + 1 for k in second.numbers]
    turns = [*range(len(first.numbers)), *range(len(second.numbers))]
    order = sorted(range(len(turns)), key=turns.__getitem__)  # of the same turn, the first stays first

    def joined(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
        return None if one is None or other is None else torch.cat((one, other))[order]

    captions = first.captions + second.captions
    durations = first.durations + second.durations
    return Batch(
        numbers=[numbers[i] for i in order],
        captions=[captions[i] for i in order],
        durations=[durations[i] for i in order],
        frames=tuple(torch.cat(same_size)[order] for same_size in zip(first.frames, second.frames)),
        cover=joined(first.cover, second.cover),
        skipped=first.skipped | second.skipped,
        codes=joined(first.codes, second.codes),
    )


def read_captions(source: Source, count: int, seed: int) -> Iterator[str]:
    """Captions of a source, the same for the same seed: `count` of one without end, else four of every
    video, but no more than `count`."""
    for k in range(count if source.count is None else min(count, 4 * source.count)):
        index = k if source.count is None else k % source.count
        yield source.caption(index, np.random.default_rng((seed, k, 2)))

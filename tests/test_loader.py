"""Batches are a function of (seed, step, rank), and clips are what their rate and duration say."""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

import numpy as np
import pytest
import torch

from cogvideo.data.cut import ClipSpec, cut_clip
from cogvideo.data.loader import ClipDataset, batches, by_turns, read_captions
from cogvideo.data.tinyworld import MOTIONS, TinyWorld, sprites
from cogvideo.data.tokens import Reuse, recurring
from cogvideo.model.vqvae import to_images
from cogvideo.text import split_words
from cogvideo.video import Clip


@dataclass(frozen=True)
class Clock:
    """A recording whose pictures tell the time: the level is 20 for each second."""

    name: int
    seconds: float
    fps: float = float("inf")

    def caption(self, rng: np.random.Generator) -> str:
        return f"clock {self.name}"

    def frames(self, times, size: int) -> np.ndarray:
        levels = np.round(np.asarray(times) * 20).astype(np.uint8)
        return np.broadcast_to(levels[:, None, None, None], (len(levels), size, size, 3)).copy()


@dataclass(frozen=True)
class Clocks:
    count: int | None
    seconds: float = 10.0
    skipped: ClassVar[dict] = {}

    def __getitem__(self, index: int) -> Clock:
        return Clock(index, self.seconds)

    def name(self, index: int) -> str:
        return f"clock {index}"

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return self[index].caption(rng)


ANY = ClipSpec(3, (1, 2, 4), sizes=(4,))
WORLD = TinyWorld(sprites(32), 1)


def take(count: int, source=WORLD, how=ClipSpec(2, (1, 8), sizes=(16,)), batch: int = 2, **options) -> list:  # noqa: B008
    return list(islice(batches(source, how, batch, **{"seed": 1, **options}), count))


def same(one, two) -> bool:
    return (
        one.captions == two.captions
        and one.durations == two.durations
        and all(torch.equal(a, b) for a, b in zip(one.frames, two.frames, strict=True))
    )


def test_a_batch_is_pictures_and_words():
    batch = take(1, how=ClipSpec(5, (1, 2), sizes=(12, 48)), batch=3)[0]
    assert len(batch.captions) == len(batch.durations) == 3
    assert [f.shape for f in batch.frames] == [(3, 5, 3, 12, 12), (3, 5, 3, 48, 48)]
    assert all(f.dtype == torch.float32 and f.min() >= 0 and 0.3 < f.max() <= 1 for f in batch.frames)
    small = torch.nn.functional.avg_pool2d(batch.frames[1].flatten(0, 1), 4)
    assert (small - batch.frames[0].flatten(0, 1)).abs().mean() < 0.01  # the same moments at both sizes


def test_pictures_keep_their_colours():
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    frames[..., 0] = 255
    pictures = to_images(frames)
    assert pictures.shape == (2, 3, 4, 6) and pictures[:, 0].eq(1).all() and pictures[:, 1:].eq(0).all()


def test_the_same_seed_gives_the_same_batches():
    one, two, other = take(4), take(4), take(4, seed=2)
    assert all(map(same, one, two)) and not any(map(same, one, other))
    assert not any(same(one[i], one[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("source", [WORLD, Clocks(7)])
def test_going_on_equals_never_having_stopped(source):
    whole = take(6, source)
    for step in (1, 4):
        assert all(map(same, take(6 - step, source, step=step), whole[step:]))


def test_worker_processes_change_nothing():
    assert all(map(same, take(3, workers=2), take(3)))


@pytest.mark.parametrize("source", [WORLD, Clocks(12)])
def test_ranks_share_the_samples_of_one(source):
    alone = take(3, source, batch=6)
    shared = [take(3, source, batch=2, rank=rank, ranks=3) for rank in range(3)]
    for step, batch in enumerate(alone):
        parts = [shared[rank][step] for rank in range(3)]
        assert [c for part in parts for c in part.captions] == batch.captions
        assert torch.equal(torch.cat([part.frames[0] for part in parts]), batch.frames[0])


def test_each_epoch_has_every_item_once_in_an_order_of_its_own():
    captions = [c for batch in take(15, Clocks(10), ANY, batch=2) for c in batch.captions]
    epochs = [captions[i : i + 10] for i in (0, 10, 20)]
    assert all(Counter(epoch) == Counter(f"clock {i}" for i in range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != [f"clock {i}" for i in range(10)]


def test_epochs_hold_across_ranks_and_odd_batches():
    shared = [take(3, Clocks(9), ANY, batch=3, rank=rank, ranks=2) for rank in range(2)]
    captions = [caption for batches in shared for batch in batches for caption in batch.captions]
    assert Counter(captions) == Counter({f"clock {i}": 2 for i in range(9)})


def test_the_duration_is_what_the_frames_span():
    rates = Counter()
    for batch in take(40, Clocks(None), ClipSpec(5, (1, 2, 4), sizes=(2,)), batch=4):
        times = batch.frames[0][:, :, 0, 0, 0] * 255 / 20
        assert torch.allclose(times[:, -1] - times[:, 0], torch.tensor(batch.durations), atol=0.06)
        assert torch.allclose(times.diff(dim=1), torch.tensor(batch.durations)[:, None] / 4, atol=0.06)
        assert times.min() >= 0 and times.max() <= 10
        rates.update(batch.durations)
    assert set(rates) == {4.0, 2.0, 1.0} and min(rates.values()) > 30


def test_keep_takes_the_first_frames_of_the_window():
    whole = cut_clip(Clock(0, 10), ClipSpec(5, (1,), sizes=(2,)), np.random.default_rng(3))
    first = cut_clip(Clock(0, 10), ClipSpec(5, (1,), keep=2, sizes=(2,)), np.random.default_rng(3))
    assert first.duration == whole.duration == 4.0
    assert np.array_equal(first.frames[0], whole.frames[0][:2])


def test_only_rates_whose_window_fits_are_chosen():
    how = ClipSpec(5, (1, 2, 4), sizes=(2,))
    spans = {cut_clip(Clock(0, 2.5), how, np.random.default_rng(i)).duration for i in range(30)}
    assert spans == {2.0, 1.0}
    with pytest.raises(ValueError, match="0.50 s at inf frames a second are too few for 5 frames at 1, 2, 4"):
        cut_clip(Clock(0, 0.5), how, np.random.default_rng(0))
    slow = {cut_clip(Clock(0, 9, fps=2.0), how, np.random.default_rng(i)).duration for i in range(30)}
    assert slow == {4.0, 2.0}  # four frames a second are not there


@pytest.mark.parametrize(("one", "other"), [(2, 2), (3, 2), (1, 1)])
def test_clips_of_two_sources_come_by_turns(one, other):
    first, second = take(1, Clocks(9), ANY, one)[0], take(1, Clocks(None, 20.0), ANY, other)[0]
    second = replace(second, captions=[f"other {caption}" for caption in second.captions])
    both = by_turns(first, second)
    assert both.captions[: 2 * other : 2] == first.captions[:other]
    assert both.captions[1 : 2 * other : 2] == second.captions
    assert sorted(both.captions) == sorted(first.captions + second.captions)
    assert len({*both.numbers}) == one + other  # each has its own random numbers
    for caption, duration, clip in zip(both.captions, both.durations, both.frames[0], strict=True):
        source = second if caption in second.captions else first
        i = source.captions.index(caption)
        assert duration == source.durations[i] and torch.equal(clip, source.frames[0][i])


def test_a_folder_of_videos_goes_through(tmp_path):
    from cogvideo.data.sources import open_source

    for i in range(3):
        Clip(np.full((9, 32, 40, 3), 60 * i + 40, np.uint8), 8).save(tmp_path / f"{i}.mp4")
        (tmp_path / f"{i}.txt").write_text(str(60 * i + 40))
    for batch in take(3, open_source(tmp_path), ClipSpec(3, (2, 8), sizes=(8, 16))):
        for caption, pictures in zip(batch.captions, batch.frames[0], strict=True):
            assert abs(float(pictures.mean()) * 255 - int(caption)) < 3


class Few(Clocks):
    """One recording in 500 is long enough."""

    def __getitem__(self, index: int) -> Clock:
        return Clock(index, 10.0 if index == 321 else 0.1)


def test_one_usable_recording_is_found_among_many_that_are_not():
    found = take(3, Few(500), ANY, batch=2)
    assert {caption for batch in found for caption in batch.captions} == {"clock 321"}
    assert "clock 321" not in found[0].skipped and "too few" in next(iter(found[0].skipped.values()))


def test_what_is_said_of_a_scene_does_not_follow_from_the_scene():
    """Source and loader may have the same seed: each word, rate and language comes with each motion."""
    world, how = TinyWorld(sprites(8), 1, even=True), ClipSpec(3, (2, 4), keep=1, sizes=(8,))
    same, other = ({w for c in read_captions(world, 4000, seed) for w in split_words(c)} for seed in (1, 2))
    assert len(same ^ other) < 0.02 * len(same)
    clips = ClipDataset(world, how, seed=1)
    found = {(world[k].scene.motion, clips[k][1].duration, clips[k][1].caption.isascii()) for k in range(400)}
    assert len(found) == len(MOTIONS) * 2 * 2


REUSE = Reuse(3, pool=24)


def encode_clock(clips: torch.Tensor) -> torch.Tensor:
    """Levels of Clock, as codes."""
    return (clips[:, :, 0, :2, :2] * 255).round().long().flatten(2)


def recur(count: int, source=WORLD, batch: int = 4, encode=encode_clock, **options) -> list:  # noqa: B008
    options = {"seed": 1, **options}
    how = ClipSpec(2, (1, 8), sizes=(16,), cover=4)
    return list(islice(recurring(source, how, batch, REUSE, encode, **options), count))


def same_codes(one, two) -> bool:
    equal = torch.equal(one.codes, two.codes) and (one.cover is None or torch.equal(one.cover, two.cover))
    return equal and (one.numbers, one.captions, one.durations) == (two.numbers, two.captions, two.durations)


def test_a_clip_recurs_as_often_as_asked_and_never_within_a_batch():
    uses, last, gaps = Counter(), {}, []
    for step in range(300):
        clips = [number for _, number in (REUSE.clip(1, step, place, 4) for place in range(4))]
        assert len(set(clips)) == 4
        gaps += [step - last[clip] for clip in clips if clip in last]
        last |= dict.fromkeys(clips, step)
        uses.update(clips)
    assert max(uses.values()) == 3 and sum(n == 3 for n in uses.values()) > 0.9 * len(uses)
    assert sum(gaps) / len(gaps) > 4


def test_only_new_clips_are_encoded_and_captions_are_drawn_anew():
    encoded = []

    def encode(clips: torch.Tensor) -> torch.Tensor:
        encoded.append(len(clips))
        return encode_clock(clips)

    found = recur(150, encode=encode)
    assert len(encoded) < 1.1 * 150 * 4 / 3
    said: dict[tuple, set] = {}
    for batch in found:
        for codes, caption in zip(batch.codes.flatten(1).tolist(), batch.captions):
            said.setdefault(tuple(codes), set()).add(caption)
    assert sum(len(captions) > 1 for captions in said.values()) > 0.8 * len(said)


@pytest.mark.parametrize("source", [WORLD, Clocks(7)])
def test_recurring_clips_are_those_of_an_uninterrupted_run(source):
    whole = recur(40, source)
    for step in (1, 17, 31):
        assert all(map(same_codes, recur(40 - step, source, step=step), whole[step:]))
    assert all(map(same_codes, recur(40, source, workers=2), whole))
    shared = [recur(40, source, batch=2, rank=rank, ranks=2) for rank in range(2)]
    for batch, *parts in zip(whole, *shared):
        assert torch.equal(torch.cat([part.codes for part in parts]), batch.codes)
        assert [c for part in parts for c in part.captions] == batch.captions


@pytest.mark.parametrize("take", [take, recur])
def test_a_caption_is_dropped_by_its_sample(take):
    """Alone, in a batch, on any rank, with other data workers: the same samples have no caption, and all
    else stays."""
    kept = take(12, batch=4)
    whole = take(12, batch=4, drop=0.4)
    captions = [caption for batch in whole for caption in batch.captions]
    assert 0.2 < captions.count("") / len(captions) < 0.6
    shared = [take(12, batch=2, drop=0.4, rank=rank, ranks=2) for rank in range(2)]
    for batch, plain, *parts in zip(whole, kept, *shared):
        assert [caption for part in parts for caption in part.captions] == batch.captions
        assert all(mine in ("", theirs) for mine, theirs in zip(batch.captions, plain.captions))
        assert batch.numbers == plain.numbers and batch.durations == plain.durations
    later = take(5, batch=4, drop=0.4, step=7)
    assert [batch.captions for batch in later] == [batch.captions for batch in whole[7:]]


def test_a_sample_alone_is_the_same_in_a_batch():
    whole = take(2, batch=4, drop=0.4)
    alone = take(8, batch=1, drop=0.4)
    assert [one.captions[0] for one in alone] == [caption for batch in whole for caption in batch.captions]
    assert all(torch.equal(alone[i].frames[0][0], whole[i // 4].frames[0][i % 4]) for i in range(8))


def test_ranks_encode_a_clip_once_together():
    encoded = []
    for rank in range(2):
        recur(90, batch=2, rank=rank, ranks=2, encode=lambda clips: encoded.append(1) or encode_clock(clips))
    assert len(encoded) < 1.15 * 90 * 4 / 3

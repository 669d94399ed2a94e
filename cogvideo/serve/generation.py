"""One batch of jobs: phase after phase; drafts are stored after each, so that another worker can resume.

Jobs of a batch share model, frames and guidance. A video is its seed's, whatever the batch; jobs that are
cancelled meanwhile leave it at the next phase, and when none is left, it ends at once.
"""

import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cogvideo.generate.cogvideo import CogVideo
from cogvideo.generate.draft import Draft
from cogvideo.generate.pipeline import Pipeline
from cogvideo.generate.regression import RegressionPipeline
from cogvideo.serve import uploads
from cogvideo.serve.jobs import Batch, Held, Job, JobStore
from cogvideo.serve.previews import Strip, spritesheet, thumbnail
from cogvideo.serve.results import VARIANTS, Results
from cogvideo.video import Clip

PREVIEW_SECONDS = 0.25  # between two pictures, at least
PREVIEW_SHARE = 0.05  # of the time, at most, that pictures within a round of interpolation may take
KEYFRAMES_SHARE = 0.2  # and before: one frame after the other comes to be, and people watch it
REPORT_SECONDS = 0.4  # between two reports of progress
DECODING = 0.15  # of all progress: pixels and files
FIRST_FRAME = "first frame"  # the phase that clients wait for


class Cancelled(Exception):
    """No job of the batch is held any more."""


@dataclass(frozen=True)
class Place:
    """Where the jobs of a batch are kept, and what is still held of them."""

    store: JobStore
    results: Results
    held: Callable[[], Held]


class Generation:
    """Generates a batch with a model, and stores what it finishes."""

    def __init__(self, pipe: Pipeline, batch: Batch, place: Place):
        self.pipe = pipe
        self.lease = batch.lease
        self.jobs = list(batch.jobs)
        self.place = place
        self.first_frame_seconds: float | None = None  # that the phase of all took, if it was not resumed
        self._strips: dict[str, Strip] = {}
        self._next_preview = 0.0
        self._reported = 0.0

    def run(self) -> None:
        if isinstance(self.pipe, CogVideo):
            self._sample(self.pipe)
        else:
            assert isinstance(self.pipe, RegressionPipeline)
            self._regress(self.pipe)

    # -- the family cogvideo --

    def _sample(self, pipe: CogVideo) -> None:
        phases = Phases.of(pipe, self.jobs[0])
        draft = self._stored_draft()
        started = time.monotonic()

        def progress(task: str, done: int, total: int) -> None:
            self._report(phases.percent(task, done / max(total, 1)), task)
            if task == FIRST_FRAME and done == total:
                self.first_frame_seconds = time.monotonic() - started

        def watch(codes: Tensor) -> None:
            self._show(pipe, codes, finished=False)

        if draft is None:
            draft = self._first_phase(pipe, progress, watch)
            draft = self._keep(pipe, draft)
        while draft.fps < self.jobs[0].request.fps:
            draft = pipe.interpolate(draft, progress=progress, watch=watch)
            draft = self._keep(pipe, draft)
        draft = pipe.superresolve(draft, progress=progress)
        for job, rows in self._rows():
            self._report(phases.percent("decode", 0.0), "decode")
            part = _part(draft, rows)
            self._finish(job, pipe.upscale(pipe.decode(part)))

    def _first_phase(
        self, pipe: CogVideo, progress: Callable[[str, int, int], None], watch: Callable[[Tensor], None]
    ) -> Draft:
        """Key frames, or the one frame that is asked for."""
        prompts = []
        seeds: list[int] = []
        for job in self.jobs:
            request = job.request
            assert request.seed is not None
            prompts += [request.prompt] * request.n
            seeds += range(request.seed, request.seed + request.n)
        scale = self.jobs[0].request.guidance_scale
        if self.jobs[0].request.num_frames == 1:
            return pipe.first_frames(prompts, seeds, guidance_scale=scale, progress=progress, watch=watch)
        begin = self._beginning(pipe)
        return pipe.keyframes(
            prompts, seeds, begin=begin, guidance_scale=scale, progress=progress, watch=watch
        )

    def _beginning(self, pipe: CogVideo) -> Draft | None:
        """What the videos start with: as many frames for every job of the batch."""
        drafts = []
        for job in self.jobs:
            request = job.request
            if not request.begin:
                return None
            data = self.place.results.get(job.id, "input.npz")
            assert data is not None, f"the input of {job.id} is gone"
            clip = uploads.load(data)
            assert request.seed is not None
            seeds = list(range(request.seed, request.seed + request.n))
            drafts.append(pipe.encode([clip] * request.n, [request.prompt] * request.n, seeds))
        return _join(drafts)

    def _stored_draft(self) -> Draft | None:
        """The drafts of all jobs, where they were stored; else they begin anew, all of them."""
        drafts = []
        for job in self.jobs:
            data = self.place.results.get(job.id, "draft.npz") if job.frames else None
            if data is None:
                return None
            drafts.append(Draft.load(io.BytesIO(data)))
        return _join(drafts)

    def _keep(self, pipe: CogVideo, draft: Draft) -> Draft:
        """Store the draft of each job, and continue without the cancelled jobs."""
        if draft.fps < self.jobs[0].request.fps:  # else the video itself comes next
            self._show(pipe, draft.codes, finished=True)
        held = self.place.held().ids
        kept = []
        parts = []
        for job, rows in self._rows():
            if job.id not in held:
                continue
            part = _part(draft, rows)
            stream = io.BytesIO()
            part.write(stream)
            self.place.results.put(job.id, "draft.npz", stream.getvalue())
            if not self.place.store.advance(self.lease, job.id, part.codes.shape[1]):
                self._clear(job)
                continue
            kept.append(job)
            parts.append(part)
        self.jobs = kept
        self._check()
        return _join(parts)

    def _rows(self) -> Iterator[tuple[Job, slice]]:
        """Each job, and its rows of the batch."""
        first = 0
        for job in list(self.jobs):
            yield job, slice(first, first + job.request.n)
            first += job.request.n

    # -- the regression family --

    def _regress(self, pipe: RegressionPipeline) -> None:
        for number, job in enumerate(list(self.jobs)):
            self._report(100 * number // len(self.jobs), "frames")
            clips = pipe.upscale(pipe.regress([job.request.prompt], job.request.num_frames))
            self._finish(job, clips)

    # -- what clients see --

    def _check(self) -> None:
        if not self.place.held().ids.intersection(job.id for job in self.jobs):
            raise Cancelled

    def _report(self, percent: int, task: str) -> None:
        self._check()
        now = time.monotonic()
        if now - self._reported > REPORT_SECONDS:
            self._reported = now
            self.place.store.report(self.lease, percent, task)

    def _show(self, pipe: CogVideo, codes: Tensor, finished: bool) -> None:
        """Draw the first clip of each job that somebody watches: at a phase's end always, else rarely."""
        started = time.monotonic()
        if not finished and started < self._next_preview:
            return
        watched = self.place.held().watched
        for job, rows in self._rows():
            if job.id not in watched:
                continue
            strip = self._strips.setdefault(job.id, Strip(pipe.parts.vqvae))
            clip = codes[rows.start].cpu()
            image = strip.draw(clip)
            stage = f"{len(clip)} frames"
            self.place.store.show(self.lease, job.id, stage, len(clip), image)
        now = time.monotonic()
        share = PREVIEW_SHARE if codes.shape[1] > pipe.spec.model.frames else KEYFRAMES_SHARE
        self._next_preview = now + max(PREVIEW_SECONDS, (now - started) / share)

    def _finish(self, job: Job, clips: Sequence[Clip]) -> None:
        """Store the files of a job, then complete it; if it is no longer held, the files go."""
        if job.id not in self.place.held().ids:
            return
        results = self.place.results
        size = 0
        for number, clip in enumerate(clips):
            for variant, data in _files(clip).items():
                results.put(job.id, VARIANTS[variant].format(number), data)
                size += len(data)
        if not self.place.store.finish(self.lease, job.id, size):
            self._clear(job)

    def _clear(self, job: Job) -> None:
        """Remove the files of a job that was cancelled meanwhile; another worker's stay."""
        known = self.place.store.get(job.id)
        if known is None or known.error_code == "cancelled":
            self.place.results.remove(job.id)


@dataclass(frozen=True)
class Phases:
    """The phases of a job, and the share of its steps that each has."""

    tasks: tuple[str, ...]
    steps: tuple[int, ...]

    @classmethod
    def of(cls, pipe: CogVideo, job: Job) -> "Phases":
        c = pipe.spec.model
        request = job.request
        steps = {}
        if not request.begin:
            steps[FIRST_FRAME] = c.frame_tokens
        if request.num_frames > 1:
            steps["key frames"] = (c.frames - max(1, request.begin_frames)) * c.frame_tokens
        fps = pipe.frame_counts[c.frames]
        while fps < request.fps:
            fps *= 2
            steps[f"to {fps:g} fps"] = (c.frames // 2) * c.frame_tokens
        steps["decode"] = round(DECODING * sum(steps.values()))
        return cls(tuple(steps), tuple(steps.values()))

    def percent(self, task: str, share: float) -> int:
        """Progress of all, in percent, when a share of a task is done."""
        if task not in self.tasks:
            return 0
        before = self.tasks.index(task)
        done = sum(self.steps[:before]) + share * self.steps[before]
        return min(99, int(100 * done / sum(self.steps)))


def _part(draft: Draft, rows: slice) -> Draft:
    """Some clips of a draft; `_join` puts such parts together again."""
    return replace(draft, codes=draft.codes[rows], prompts=draft.prompts[rows], seeds=draft.seeds[rows])


def _join(drafts: Sequence[Draft]) -> Draft:
    prompts = tuple(prompt for draft in drafts for prompt in draft.prompts)
    seeds = tuple(seed for draft in drafts for seed in draft.seeds)
    return Draft(torch.cat([draft.codes for draft in drafts]), drafts[0].fps, prompts, seeds)


def _files(clip: Clip) -> dict[str, bytes]:
    """All variants of a clip."""
    files = {"thumbnail": thumbnail(clip), "spritesheet": spritesheet(clip)}
    with tempfile.TemporaryDirectory() as folder:
        for variant in ("video", "gif"):
            file = Path(folder) / VARIANTS[variant].format(0)
            clip.save(file)
            files[variant] = file.read_bytes()
    return files

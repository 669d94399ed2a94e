"""Ours: the paper's method, by the package's own training and generation; and its first frame, repeated."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from benchmarks.ablate import tokenizer_of
from benchmarks.rivals.contest import FPS, to_clips
from benchmarks.rivals.phased import Part, Phased
from cogvideo.generate.cogvideo import CogVideo
from cogvideo.generate.draft import Draft
from cogvideo.layout import rounds
from cogvideo.model.families import CogVideoSpec
from cogvideo.model.folder import ModelFolder, find_model
from cogvideo.video import Clip


class Ours(Phased):
    name = "ours"
    recipe = "tiny"
    plan: ClassVar[tuple[Part, ...]] = (Part("image", 0.5), Part("stage1", 0.25), Part("stage2", 0.25))
    learnt: ClassVar[tuple[str, ...]] = ("base", "stage1", "stage2")
    changes: ClassVar[dict[str, Any]] = {}  # of the transformer's config

    @property
    def spec(self) -> CogVideoSpec:
        spec = self.size.spec
        return replace(spec, model=replace(spec.model, **self.changes))

    def start(self) -> ModelFolder | None:
        """The tokenizer of a trained model."""
        return tokenizer_of(ModelFolder(find_model(self.size.model)), self.out / "tokenizer")

    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Clip]:
        pipe = CogVideo(self.folder)
        draft = self.keyframes(pipe, captions, seeds)
        while draft.fps < max(rounds(self.size.spec.model.frames).values()):
            draft = pipe.interpolate(draft)
        return to_clips(pipe.parts.vqvae, draft.codes, captions)

    def keyframes(self, pipe: CogVideo, captions: Sequence[str], seeds: Sequence[int]) -> Draft:
        return pipe.keyframes(list(captions), list(seeds))


class Still(Ours):
    """The floor of everything that moves: the first frame of ours, repeated."""

    name = "still"

    def train(self, minutes: float, lr: float | None, seed: int) -> None:
        """Nothing of its own: it shows what `ours` has trained."""

    @property
    def folder(self) -> ModelFolder:
        return ModelFolder(self._shown.out / "stage2" / "model")

    @property
    def _shown(self) -> Ours:
        return Ours(self.size, self.out.with_name(self.out.name.replace("still", "ours")))

    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Clip]:
        pipe = CogVideo(self.folder)
        draft = pipe.first_frames(list(captions), list(seeds))
        clips = to_clips(pipe.parts.vqvae, draft.codes, captions)
        return [Clip(np.repeat(clip.frames, 33, axis=0), FPS, clip.caption) for clip in clips]

    @property
    def minutes(self) -> float:
        return self._shown.minutes * self.plan[0].share

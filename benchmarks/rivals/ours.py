"""Ours: the paper's method, by the package's own training and generation; and its first frame, repeated."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.ablate import tokenizer_of
from benchmarks.budget import steps_within
from benchmarks.rivals.contest import FPS, Size, System, to_clips
from cogvideo.data.cut import Source
from cogvideo.data.sources import open_source
from cogvideo.files import write_json
from cogvideo.generate.cogvideo import CogVideo
from cogvideo.generate.draft import Draft
from cogvideo.layout import rounds
from cogvideo.model.families import CogVideoSpec
from cogvideo.model.folder import ModelFolder, find_model
from cogvideo.train import loop, objectives, recipes
from cogvideo.train.run import Options, Run
from cogvideo.video import Clip

MEASURED_STEPS = 12  # after which the steps that fit are known


@dataclass(frozen=True)
class Part:
    """A phase of the recipe, the share of the time that it gets, and the fields that differ from the
    recipe's."""

    phase: str
    share: float
    changes: dict[str, Any] = field(default_factory=dict)


class Ours(System):
    name = "ours"
    plan: ClassVar[tuple[Part, ...]] = (Part("image", 0.5), Part("stage1", 0.25), Part("stage2", 0.25))
    changes: ClassVar[dict[str, Any]] = {}  # of the transformer's config

    @property
    def spec(self) -> CogVideoSpec:
        spec = self.size.spec
        return replace(spec, model=replace(spec.model, **self.changes))

    def __init__(self, size: Size, out: Path, processes: int = 1):
        super().__init__(size, out)
        self.processes = processes  # that share each batch, each with a core

    def start(self) -> ModelFolder | None:
        """What the first phase starts from: the tokenizer of a trained model."""
        return tokenizer_of(ModelFolder(find_model(self.size.model)), self.out / "tokenizer")

    def train(self, minutes: float, lr: float | None, seed: int) -> None:
        """Phase after phase. The steps of each are decided once, from its speed, and kept in a file."""
        init = self.start()
        for part in self.plan:
            phase = replace(recipes.find("tiny").phase(part.phase), **part.changes)
            if lr is not None:
                phase = replace(phase, lr=lr)
            recipe = replace(recipes.find("tiny"), phases=(phase,), sprites=self.size.sprites, seed=seed)
            source = open_source("tinyworld", seed=seed, sprites=self.size.sprites)
            steps = self._steps(minutes * part.share, recipe, source, init)
            phase = replace(phase, steps=steps, warmup=min(phase.warmup, steps // 10))
            recipe = replace(recipe, phases=(phase,))
            options = Options(init=init, quiet=True, save_every=20, processes=self.processes)
            started = time.process_time()
            init = loop.train(Run(recipe, self.out / part.phase, source, self.spec, [phase], options))
            self._spend(part.phase, time.process_time() - started)

    def _steps(self, minutes: float, recipe: recipes.Recipe, source: Source, init: ModelFolder | None) -> int:
        """The steps of the recipe's phase that fit into so many minutes."""
        (phase,) = recipe.phases
        least = objectives.UNQUANTISED + 1 if "vqvae" in phase.trains else 1
        options = Options(init=init, quiet=True, processes=self.processes)
        run = Run(recipe, self.out / f"speed-{phase.name}", source, self.spec, [phase], options)
        file = self.out / f"steps-{phase.name}.json"
        return steps_within(minutes, run, max(MEASURED_STEPS, least), file, least)

    def _spend(self, name: str, seconds: float) -> None:
        file = self.out / "seconds.json"
        spent: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        spent[name] = spent.get(name, 0.0) + seconds
        write_json(file, spent)

    @property
    def folder(self) -> ModelFolder:
        return ModelFolder(self.out / self.plan[-1].phase / "model")

    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Clip]:
        pipe = CogVideo(self.folder)
        draft = self.keyframes(pipe, captions, seeds)
        while draft.fps < max(rounds(self.size.spec.model.frames).values()):
            draft = pipe.interpolate(draft)
        return to_clips(pipe.parts.vqvae, draft.codes, captions)

    def keyframes(self, pipe: CogVideo, captions: Sequence[str], seeds: Sequence[int]) -> Draft:
        return pipe.keyframes(list(captions), list(seeds))

    @property
    def parameters(self) -> int:
        parts = {"base", *(part.phase for part in self.plan if part.phase != "image")}
        return sum(shape.numel() for part in parts for shape in self.spec.shapes(part).values())

    @property
    def minutes(self) -> float:
        file = self.out / "seconds.json"
        return sum(json.loads(file.read_text()).values()) / 60 if file.exists() else 0.0


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

"""Systems that the package trains itself: phase after phase of a recipe, each for a share of the time."""

import json
import time
from abc import abstractmethod
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.budget import steps_within
from benchmarks.rivals.contest import Size, System
from cogvideo.data.cut import Source
from cogvideo.data.sources import open_source
from cogvideo.files import write_json
from cogvideo.model.families import Spec
from cogvideo.model.folder import ModelFolder
from cogvideo.train import loop, objectives, recipes
from cogvideo.train.run import Options, Run

TERMS = "terms.json"  # of a training: how long, with which seed
SECONDS = "seconds.json"  # that each phase took
MEASURED_STEPS = 12  # after which the steps that fit are known


@dataclass(frozen=True)
class Part:
    """A phase of the recipe, the share of the time that it gets, and the fields that differ from the
    recipe's."""

    phase: str
    share: float
    changes: dict[str, Any] = field(default_factory=dict)


class Phased(System):
    recipe: ClassVar[str]
    plan: ClassVar[tuple[Part, ...]]
    taken: ClassVar[int] = 0  # leading phases that `ours` has as well; its models are taken
    learnt: ClassVar[tuple[str, ...]]  # the parts of the model whose numbers are counted

    def __init__(self, size: Size, out: Path, processes: int = 1):
        super().__init__(size, out)
        self.processes = processes  # that share each batch, each with a core

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """The sizes of the model."""

    def start(self) -> ModelFolder | None:
        """What the first phase starts from, if not from nothing."""
        return None

    def train(self, minutes: float, lr: float | None, seed: int) -> None:
        """Phase after phase. The steps of each are decided once, from its speed, and kept in a file."""
        self.out.mkdir(parents=True, exist_ok=True)
        terms = {"minutes": minutes, "lr": lr, "seed": seed, "size": asdict(self.size)}
        write_json(self.out / TERMS, terms)
        init = self.start()
        for number, part in enumerate(self.plan):
            trained = self._trained_by_ours(part.phase, terms) if number < self.taken else None
            if trained is not None:
                init = trained
                continue
            recipe = recipes.find(self.recipe)
            phase = replace(recipe.phase(part.phase), **part.changes)
            if lr is not None:
                phase = replace(phase, lr=lr)
            recipe = replace(recipe, phases=(phase,), sprites=self.size.sprites, seed=seed)
            source = open_source("tinyworld", seed=seed, sprites=self.size.sprites)
            steps = self._steps(minutes * part.share, recipe, source, init)
            phase = replace(phase, steps=steps, warmup=min(phase.warmup, steps // 10))
            recipe = replace(recipe, phases=(phase,))
            options = Options(init=init, quiet=True, save_every=20, processes=self.processes)
            started = time.process_time()
            init = loop.train(Run(recipe, self.out / part.phase, source, self.spec, [phase], options))
            seconds = time.process_time() - started
            self._record(part.phase, self._spent().get(part.phase, 0.0) + seconds)

    def _trained_by_ours(self, phase: str, terms: dict[str, Any]) -> ModelFolder | None:
        """The model of a phase as `ours` has trained it, if on the same terms; its time counts here too."""
        ours = self.out.with_name(self.out.name.replace(self.name, "ours"))
        file = ours / TERMS
        if not file.exists() or json.loads(file.read_text()) != terms:
            return None
        seconds = json.loads((ours / SECONDS).read_text())
        if phase not in seconds:
            return None
        self._record(phase, seconds[phase])
        return ModelFolder(ours / phase / "model")

    def _steps(self, minutes: float, recipe: recipes.Recipe, source: Source, init: ModelFolder | None) -> int:
        """The steps of the recipe's phase that fit into so many minutes."""
        (phase,) = recipe.phases
        least = objectives.UNQUANTISED + 1 if "vqvae" in phase.trains else 1
        options = Options(init=init, quiet=True, processes=self.processes)
        run = Run(recipe, self.out / f"speed-{phase.name}", source, self.spec, [phase], options)
        file = self.out / f"steps-{phase.name}.json"
        return steps_within(minutes, run, max(MEASURED_STEPS, least), file, least)

    def _spent(self) -> dict[str, float]:
        file = self.out / SECONDS
        spent: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        return spent

    def _record(self, phase: str, seconds: float) -> None:
        write_json(self.out / SECONDS, {**self._spent(), phase: seconds})

    @property
    def folder(self) -> ModelFolder:
        return ModelFolder(self.out / self.plan[-1].phase / "model")

    @property
    def parameters(self) -> int:
        return sum(shape.numel() for part in self.learnt for shape in self.spec.shapes(part).values())

    @property
    def minutes(self) -> float:
        return sum(self._spent().values()) / 60

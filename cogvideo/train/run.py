"""A training run: a recipe, its data, and the folder in which it leaves a model.

A run is a folder:
    model/          the model folder so far: each phase reads from it what it needs and writes what it trained
    <phase>/        state.pt to resume from, log.jsonl, loss.png, strips/

`Run` knows what is finished, what came before a phase, and where a phase begins. `Run.preflight` answers
every question that can be answered before work starts.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cogvideo.data.cut import Source
from cogvideo.data.loader import Batch, batches
from cogvideo.hardware import find_device, free_memory
from cogvideo.layout import SECONDS
from cogvideo.model.families import Spec
from cogvideo.model.folder import ModelFolder
from cogvideo.text import TextTokenizer
from cogvideo.train import checkpoint, inherit, parallel
from cogvideo.train.inputs import Parts
from cogvideo.train.phase import Phase
from cogvideo.train.recipes import Recipe

LENGTH_CHECKED = 2_000  # captions of a source without end

# what shows how a phase is doing: (model folder, parts, phase, batch, image to write)
Probe = Callable[[ModelFolder, Parts, Phase, Batch, Path], None]


@dataclass(frozen=True)
class Options:
    """How a run uses the machine, and what it starts from. None changes a result but by rounding."""

    device: torch.device | str = "cpu"
    processes: int = 1  # that share each batch; started by torchrun, this is not asked
    workers: int = 0  # processes that read clips ahead, for each process
    shard: bool = False  # cut the weights into shards, one a process
    recompute: bool = False  # save memory for time
    compile: bool = False  # save time for a slow start
    save_every: int = 250  # steps
    log_every: int = 25
    probe_every: int = 1000
    probe: Probe | None = None
    quiet: bool = False
    init: ModelFolder | None = None  # what a new run takes the weights of
    init_embedding: str | None = None  # a file or hub id of GPT-2's embedding of words

    @property
    def started(self) -> bool:
        """Whether torchrun started this process, as one of several."""
        return "RANK" in os.environ

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return int(os.environ["WORLD_SIZE"]) if self.started else self.processes


@dataclass(frozen=True)
class Run:
    """Phases of a recipe, trained in the folder `out`."""

    recipe: Recipe
    out: Path
    source: Source
    spec: Spec
    options: Options = field(default_factory=Options)

    @property
    def folder(self) -> ModelFolder:
        """The model folder of the run."""
        return ModelFolder(self.out / "model")

    def place(self, phase: Phase) -> Path:
        """The folder of a phase."""
        return self.out / phase.name

    def state(self, phase: Phase) -> Path:
        """The file that a phase resumes from."""
        return self.place(phase) / "state.pt"

    def seed(self, phase: Phase) -> int:
        return self.recipe.seed + 1000 * self._number(phase)

    def _number(self, phase: Phase) -> int:
        return [other.name for other in self.recipe.phases].index(phase.name)

    # -- what was done before

    def finished(self, phase: Phase) -> bool:
        """Whether a phase is at its last step."""
        row = self._trained().get(phase.name)
        return row is not None and row["steps"] >= phase.steps and self.state(phase).exists()

    def _trained(self) -> dict[str, dict[str, int]]:
        """The phases that were finished, with their steps."""
        if not (self.folder.path / "config.json").exists():
            return {}
        trained: dict[str, dict[str, int]] = self.folder.config.get("trained", {})
        return trained

    def previous(self, phase: Phase) -> Phase | None:
        """The last phase before this one that was begun and trains what this one trains."""
        earlier = self.recipe.phases[: self._number(phase)]
        return next(self._begun(reversed(earlier), phase), None)

    def later(self, phase: Phase) -> Phase | None:
        """The first phase after this one that was begun and trains what this one trains."""
        return next(self._begun(self.recipe.phases[self._number(phase) + 1 :], phase), None)

    def _begun(self, phases: Iterable[Phase], phase: Phase) -> Iterable[Phase]:
        for other in phases:
            if {*other.trains} & {*phase.trains} and self.state(other).exists():
                yield other

    def remaining(self, phases: Sequence[Phase]) -> list[Phase]:
        """The phases that are not finished. Raise ValueError if resuming one would discard a later phase that
        was trained from it."""
        found = []
        for phase in phases:
            if self.finished(phase):
                continue
            later = self.later(phase)
            if later is not None:
                raise ValueError(
                    f"cannot resume {phase.name}: {later.name} was already trained from it; "
                    f"delete {self.place(later)} to train it again after {phase.name}"
                )
            found.append(phase)
        return found

    # -- where a phase begins

    def new_part(self, name: str, phase: Phase) -> nn.Module:
        """A part as a phase begins to train it: the previous phase's, else the folder's, else a copy of what
        the phase inherits, else new weights."""
        seed = self.seed(phase)
        previous = self.previous(phase)
        if previous is not None:
            part = inherit.new_part(self.folder.spec(), name, seed)
            part.load_state_dict(checkpoint.read(self.state(previous))["parts"][name])
        elif self.folder.has(name):
            part = self.folder.load(name)
        else:
            part = inherit.new_part(self.folder.spec(), name, seed)
            if phase.inherits:
                inherit.copy_parent(part, self.folder.load(phase.inherits))
        phase.objective.prepare(part, phase)
        return part

    # -- before work starts

    def preflight(self, phases: Sequence[Phase]) -> tuple["Run", list[Phase]]:
        """Check everything that can be checked before work starts: ValueError for what cannot be trained.

        Returns the phases that are not finished, with their numbers of steps, and the run with its device and
        whether its weights are cut into shards.
        """
        device = find_device(self.options.device)
        ranks = self.options.ranks
        self._check_devices(device)
        phases = self.remaining([phase.over(self.source.count) for phase in phases])
        for phase in phases:
            parallel.share(phase, ranks)
            phase.check(self.spec)
        self._check_parts(phases)
        self._check_previous(phases)
        shard = check_memory(phases, self.spec, device, ranks, self.options.shard)
        for phase in phases:
            parallel.share(phase, ranks, shard)
        inherit.check(self.folder, self.recipe, self.spec, self.options.init, self.options.init_embedding)
        check_data(phases, self.source)
        options = replace(self.options, device=device, shard=shard)
        return replace(self, options=options), phases

    def _check_devices(self, device: torch.device) -> None:
        if device.type != "cuda" or self.options.started:
            return
        count = torch.cuda.device_count()
        if self.options.processes > count:
            raise ValueError(f"{self.options.processes} processes need a device each, and there are {count}")

    def _check_parts(self, phases: Sequence[Phase]) -> None:
        """Raise ValueError if a phase uses a part that is not there and that no phase before it trains."""
        init = self.options.init
        there = {part for part in self.spec.parts if self.folder.has(part)}
        if init is not None:
            there |= {part for part in init.spec().parts if init.has(part)}
        for phase in phases:
            needed = list(phase.uses)
            if phase.inherits and not self.folder.has(phase.trains[0]):
                needed.append(phase.inherits)
            for part in needed:
                if part not in there and part not in phase.trains:
                    raise ValueError(
                        f"the phase {phase.name} needs the part {part}, which is not in "
                        f"{self.folder.path}; train the phase that trains it first"
                    )
            there |= {*phase.trains}

    def _check_previous(self, phases: Sequence[Phase]) -> None:
        """Raise ValueError if a phase would begin with one that was stopped before its end."""
        done = {*self._trained(), *(phase.name for phase in phases)}
        for phase in phases:
            previous = self.previous(phase)
            if previous is not None and previous.name not in done:
                raise ValueError(
                    f"cannot train {phase.name}: {previous.name}, which it starts from, was stopped before "
                    f"its end; finish that first, or delete {self.place(previous)}"
                )

    def warn_of_long_captions(self, text: TextTokenizer) -> None:
        """Print how many captions are cut."""
        warn_of_long_captions(text, self.source, self.spec)


def check_memory(phases: Sequence[Phase], spec: Spec, device: torch.device, ranks: int, shard: bool) -> bool:
    """Whether weights must be cut into shards: if `shard` asks for it, or if not every process has room for
    whole weights, gradients and the optimizer's averages. Raise ValueError where not even shards of those
    fit."""
    free = free_memory(device)
    copies = ranks if device.type == "cpu" else 1  # which share the memory
    for phase in phases:
        shapes = [shape for part in phase.trains for shape in spec.shapes(part).values()]
        numbers = sum(shape.numel() for shape in shapes)
        due = 4 * numbers * (4 if phase.optimizer == "adamw" else 3)
        if free is not None and due * copies > free:
            shard = ranks > 1
        if free is not None and due * copies / ranks > free:
            raise ValueError(
                f"{phase.name} needs {due * copies / ranks / 1e9:.1f} GB for weights, gradients "
                f"and averages alone, and {free / 1e9:.1f} GB are free; choose a smaller "
                f"preset, or more devices"
            )
    return shard


def check_data(phases: Sequence[Phase], source: Source) -> None:
    """Raise ValueError if there is nothing that a phase could cut its clips from."""
    for phase in phases:
        try:
            next(batches(source, phase.cut, 1, seed=0))
        except ValueError as error:
            raise ValueError(f"{phase.name} finds no clip to train on: {error}") from None


def warn_of_long_captions(text: TextTokenizer, source: Source, spec: Spec) -> None:
    """Print how many captions are cut because the model reads fewer tokens."""
    count = source.count or LENGTH_CHECKED
    length = spec.speaks.text_len
    captions = (source.caption(i, np.random.default_rng((0, i))) for i in range(count))
    long = sum(len(text.prompt(caption, SECONDS, spec.template)) > length for caption in captions)
    if long:
        print(f"{long} of {count} captions are longer than {length} tokens, and are cut")

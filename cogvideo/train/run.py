"""A training run: what is finished, where a phase begins, and whether the run can work at all.

A run is a folder:
    model/          the model folder so far: each phase reads what it needs there and writes what it trained
    lora/           the adapter so far, in a run that trains one
    <phase>/        state.pt or shards/ to resume from, log.jsonl, loss.png, strips/
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cogvideo.cluster import place_of_torchrun
from cogvideo.data.coded import CodedVideos, Table, digest
from cogvideo.data.cut import Source
from cogvideo.data.loader import Batch, batches
from cogvideo.hardware import find_device, free_memory, idle_cores
from cogvideo.limits import MOST_NUMBER, MOST_PROCESSES, check_range, check_threads, check_workers
from cogvideo.model import lora
from cogvideo.model.config import TrainedPhase
from cogvideo.model.families import Spec
from cogvideo.model.folder import ModelFolder
from cogvideo.model.vqvae import VQVAE
from cogvideo.train import checkpoint, inherit, peers
from cogvideo.train.inputs import Parts
from cogvideo.train.mesh import MeshShape, check_slices_of, local_batch
from cogvideo.train.phase import Phase
from cogvideo.train.recipes import Recipe

# writes a preview: (model folder, parts, phase, batch, image to write)
MOST_RANK = 1024  # of adapters
Probe = Callable[[ModelFolder, Parts, Phase, Batch, Path], None]


@dataclass(frozen=True)
class Options:
    """How a run works. Options change results by rounding alone, except `init`, `init_embedding`, `lora`.

    None stands for a default that depends on the machine (`with_defaults`).
    """

    device: torch.device | str = "cpu"
    processes: int | None = 1  # which share each batch; torchrun's number counts where it started them
    shard: bool = False  # cut the weights into shards, one a process: a mesh of 1 x processes x 1
    mesh: MeshShape | None = None  # how the processes divide the work
    accumulate: int = 1  # times that each process takes its clips of a step, one share after another
    recompute: bool = False  # activations in the backward pass: less memory, more time
    compile: bool = False  # the blocks of the transformer: a slow start
    workers: int | None = 0  # processes that read clips ahead, for each process
    threads: int | None = None  # CPU threads of each process; None in a run leaves torch's
    save_every: int = 250  # steps
    log_every: int = 25  # steps
    probe_every: int = 1000  # steps
    probe: Probe | None = None
    quiet: bool = False
    init: ModelFolder | None = None  # a model whose parts a new run begins with
    lora: int = 0  # rank of the adapters that learn instead of the parts themselves; 0: none
    init_embedding: str | None = None  # a file with GPT-2's embedding, for a new run to begin with

    def __post_init__(self) -> None:
        for name in ("accumulate", "save_every", "log_every", "probe_every"):
            check_range(f"--{name.replace('_', '-')}", getattr(self, name))
        most = (
            MOST_PROCESSES if place_of_torchrun() is None else MOST_NUMBER
        )  # torchrun may have many machines
        check_range("--processes", self.processes, 1, most)
        check_threads(self.threads)
        check_workers(self.workers)
        check_range("--lora", self.lora or None, 1, MOST_RANK)
        if self.lora and (self.shard or self.mesh):
            raise ValueError("--lora goes with neither --shard nor --mesh; adapters need little memory")
        if self.mesh is not None:
            check_range(f"the processes of --mesh {self.mesh}", self.mesh.ranks, 1, most)
        if self.mesh is not None and self.processes not in (None, 1, self.mesh.ranks):
            raise ValueError(
                f"--mesh {self.mesh} is {self.mesh.ranks} processes; --processes says {self.processes}"
            )

    def with_defaults(self, phases: Sequence[Phase]) -> Options:
        """Replace each None by the default for this machine and these phases. Threads stay None if the
        environment sets their number."""
        device = find_device(self.device)
        processes = self.processes or peers.fitting_processes([*phases], device)
        if self.mesh is not None:
            processes = self.mesh.ranks
        threads = self.threads
        if threads is None and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, idle_cores() // processes)
        workers = self.workers
        if workers is None:
            workers = 0 if device.type == "cpu" else (os.cpu_count() or 1) // processes
        return replace(self, device=device, processes=processes, threads=threads, workers=workers)


@dataclass(frozen=True)
class Run:
    """`phases` of a recipe, trained on a source, in the folder `out`."""

    recipe: Recipe
    out: Path
    source: Source
    spec: Spec
    phases: Sequence[Phase]
    options: Options = field(default_factory=Options)
    rehearsal: Source | None = None  # what a model knows already: half of each batch, so that it forgets less

    @property
    def folder(self) -> ModelFolder:
        return ModelFolder(self.out / "model")

    @property
    def by_torchrun(self) -> bool:
        """Whether torchrun started this process, and so all others."""
        return place_of_torchrun() is not None

    @property
    def ranks(self) -> int:
        """Processes that share each batch."""
        place = place_of_torchrun()
        return self.options.processes or 1 if place is None else place[1]

    @property
    def mesh(self) -> MeshShape | None:
        """How the processes divide the work; None: each has all weights."""
        if self.options.mesh is None and self.options.shard:
            return MeshShape(shard=self.ranks)
        return self.options.mesh

    @property
    def takers(self) -> int:
        """Shares that the clips of a step are divided into."""
        slices = self.mesh.tensor if self.mesh else 1
        return self.ranks // slices * self.options.accumulate

    def seed(self, phase: Phase) -> int:
        return self.recipe.seed + 1000 * self._names.index(phase.name)

    # -- its files

    @property
    def finished(self) -> dict[str, TrainedPhase]:
        """The phases that reached their last step, with their steps."""
        if not (self.folder.path / "config.json").exists():
            return {}
        return self.folder.config.trained or {}

    def previous(self, phase: Phase) -> Path | None:
        """The folder of the last phase before this one that trains the same part, and was saved."""
        earlier = self.recipe.phases[: self._names.index(phase.name)]
        return next(self._saved(earlier[::-1], phase), None)

    def later(self, phase: Phase) -> Path | None:
        """The folder of the first phase after this one that trains the same part, and was saved."""
        return next(self._saved(self.recipe.phases[self._names.index(phase.name) + 1 :], phase), None)

    def state(self, phase: Phase) -> Path | None:
        """The last checkpoint of a phase."""
        return checkpoint.find(self.out / phase.name)

    def new_part(self, phase: Phase, name: str) -> nn.Module:
        """A part that `phase` trains, before its first step: the previous phase's weights, else the
        folder's, else a copy of the part that the phase inherits, else new ones."""
        previous = self.previous(phase)
        part: Any
        if previous is not None:
            part = inherit.new_part(self.spec, name, self.seed(phase))
            state = checkpoint.find(previous)
            assert state is not None
            checkpoint.read_part(state, name, part)
        elif self.folder.has(name):
            part = self.folder.load(name)
        else:
            part = inherit.new_part(self.spec, name, self.seed(phase))
            if phase.inherits:
                inherit.copy(part, self.folder.load(phase.inherits))
        phase.objective.prepare(part, phase)
        module: nn.Module = part
        return module

    @property
    def adapter_file(self) -> Path:
        return self.out / "lora" / lora.FILE

    def adapter(self) -> lora.Adapter | None:
        """What earlier phases wrote."""
        return lora.Adapter.load(self.adapter_file) if self.adapter_file.exists() else None

    @property
    def _names(self) -> list[str]:
        return [phase.name for phase in self.recipe.phases]

    def _saved(self, phases: Sequence[Phase], phase: Phase) -> Iterator[Path]:
        """The folders of those phases that train a part that `phase` trains, and were saved."""
        for other in phases:
            if {*other.trains} & {*phase.trains} and self.state(other) is not None:
                yield self.out / other.name

    # -- checks before work

    def preflight(self) -> Run:
        """Return the run without its finished phases. Raise ValueError for all that can be known to fail
        before work starts."""
        run = replace(self, options=replace(self.options, device=find_device(self.options.device)))
        run.check_devices()
        run.check_batches()
        run = run.with_steps()
        run = run.without_finished()
        run.check_adapters()
        run.check_phases()
        run.check_parts()
        run.check_previous()
        run = run.with_shards()
        run.check_sharing()
        run.check_rehearsal()
        run.check_init()
        run.check_data()
        return run

    def check_devices(self) -> None:
        """Raise ValueError unless there is a device for each process, and a process for each of the mesh."""
        mesh = self.options.mesh
        if mesh is not None and mesh.ranks != self.ranks:
            raise ValueError(f"--mesh {mesh} is {mesh.ranks} processes, and there are {self.ranks}")
        if torch.device(self.options.device).type != "cuda" or self.by_torchrun:
            return
        count = torch.cuda.device_count()
        if self.ranks > count:
            raise ValueError(f"{self.ranks} processes need a device each, and there are {count}")

    def with_steps(self) -> Run:
        """Replace the epochs of each phase by steps, on this source."""
        return replace(self, phases=[phase.over(self.source.count) for phase in self.phases])

    def without_finished(self) -> Run:
        """Remove the phases that reached their last step. Raise ValueError if resuming a phase would discard
        a later one that was trained from it."""
        finished = self.finished
        remaining = []
        for phase in self.phases:
            row = finished.get(phase.name)
            if row is not None and row.steps >= phase.steps and self.state(phase) is not None:
                continue
            later = self.later(phase)
            if later is not None:
                raise ValueError(
                    f"cannot resume {phase.name}: {later.name} was already trained from it; "
                    f"delete {later} to train it again after {phase.name}"
                )
            remaining.append(phase)
        return replace(self, phases=remaining)

    def check_phases(self) -> None:
        """Raise ValueError unless the processes can share each batch, and each phase suits the model."""
        for phase in self.phases:
            local_batch(phase, self.takers)
            phase.check(self.spec)
            if self.options.accumulate > 1 and not phase.objective.accumulates:
                raise ValueError(
                    f"--accumulate must be 1 for {phase.name}, whose codebook follows all clips of a step"
                )
            if self.options.mesh is not None:
                check_slices_of(phase, self.spec, self.options.mesh)

    def check_adapters(self) -> None:
        """Raise ValueError unless each phase trains a part with adapters, of a model that is there."""
        if not self.options.lora:
            return
        for phase in self.phases:
            if not phase.objective.adapts:
                names = [other.name for other in self.recipe.phases if other.objective.adapts]
                advice = f"choose --phases {' '.join(names)}" if names else "choose another recipe"
                raise ValueError(
                    f"--lora is for transformers of codes, which {phase.name} does not train; {advice}"
                )
        if self.options.init is None and not (self.folder.path / "config.json").exists():
            raise ValueError("--lora adapts a trained model; give it as --init")
        for part in {part for phase in self.phases for part in phase.trains}:
            if not self.folder.has(part) and not (self.options.init and self.options.init.has(part)):
                raise ValueError(f"--lora adapts trained parts, and there is no {part} to adapt")

    def check_parts(self) -> None:
        """Raise ValueError unless each part that a phase uses is in the folder, in `init`, or trained by an
        earlier phase."""
        init = self.options.init
        provided = {part for part in init.spec().parts if init.has(part)} if init else set()
        for phase in self.phases:
            needed = list(phase.uses)
            if phase.inherits and not self.folder.has(phase.trains[0]):
                needed.append(phase.inherits)
            for part in needed:
                if part not in provided and part not in phase.trains and not self.folder.has(part):
                    raise ValueError(
                        f"the phase {phase.name} needs the part {part}, which is not in "
                        f"{self.folder.path}; first train the phase that trains it"
                    )
            provided |= set(phase.trains)

    def check_previous(self) -> None:
        """Raise ValueError if a phase would start from one that was stopped before its end."""
        finished = {*self.finished, *(phase.name for phase in self.phases)}
        for phase in self.phases:
            previous = self.previous(phase)
            if previous is not None and previous.name not in finished:
                raise ValueError(
                    f"{phase.name} starts from {previous.name}, which was stopped before its end; "
                    f"finish that first, or delete {previous}"
                )

    def with_shards(self) -> Run:
        """Cut the weights into shards if whole weights, gradients and optimizer states do not fit in each
        process. Raise ValueError if not even their shards fit."""
        device = torch.device(self.options.device)
        free = free_memory(device)
        if free is None:
            return self
        shard = self.options.shard
        for phase in self.phases:
            numbers = sum(shape.numel() for part in phase.trains for shape in self.spec.shapes(part).values())
            copies = self.ranks if device.type == "cpu" else 1  # which share the memory
            due = 4 * numbers * (4 if phase.optimizer == "adamw" else 3) * copies
            mesh = self.options.mesh
            cuts = mesh.shard * mesh.tensor if mesh else self.ranks
            if due > free and mesh is None:
                shard = self.ranks > 1
            if due / cuts > free:
                raise ValueError(
                    f"{phase.name} needs {due / cuts / 1e9:.1f} GB for weights, gradients "
                    f"and optimizer states alone, and {free / 1e9:.1f} GB are free; choose a smaller "
                    f"preset, or more devices"
                )
        return replace(self, options=replace(self.options, shard=shard))

    def check_batches(self) -> None:
        """Raise ValueError unless the memory holds the frames of the clips that are read for one step."""
        free = free_memory()
        if free is None:
            return
        for phase in self.phases:
            size = phase.batch * phase.clips.bytes
            if size > free:
                raise ValueError(
                    f"{phase.name}.batch is too large: the frames of {phase.batch} clips are "
                    f"{size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
                )

    def check_sharing(self) -> None:
        """Raise ValueError unless, with shards, each process has a whole number of crops."""
        for phase in self.phases:
            local_batch(phase, self.takers, self.mesh is not None)

    def check_rehearsal(self) -> None:
        """Raise ValueError unless half of each batch can be clips to rehearse."""
        if self.rehearsal is None:
            return
        if isinstance(self.source, CodedVideos) or isinstance(self.rehearsal, CodedVideos):
            raise ValueError("--rehearse needs frames on both sides; data of codes have none")
        for phase in self.phases:
            if local_batch(phase, self.takers) < 2:
                least = 2 * self.takers
                raise ValueError(
                    f"--rehearse takes half of each batch; choose --{phase.name}.batch {least} or more"
                )

    def check_init(self) -> None:
        """Raise ValueError if the initialisation is invalid or differs from the run's."""
        inherit.check(self.folder, self.recipe, self.spec, self.options.init, self.options.init_embedding)

    def _check_codes(self, table: Table) -> None:
        for phase in self.phases:
            if not phase.objective.recurs:
                raise ValueError(
                    f"{phase.name} needs frames, and these data are codes; train it on the videos themselves"
                )
        there = self.folder
        if self.options.init is not None and not there.has("vqvae"):
            there = self.options.init
        if digest(there.load_as(VQVAE, "vqvae")) != table.tokenizer:
            raise ValueError(f"these data are codes of another tokenizer than that of {there.path}")

    def check_data(self) -> None:
        """Raise ValueError unless each phase finds a clip to train on. Stored codes must be of the tokenizer
        that the phases use."""
        if isinstance(self.source, CodedVideos):
            self._check_codes(self.source.table)
        sources = [self.source] if self.rehearsal is None else [self.source, self.rehearsal]
        for phase in self.phases:
            for source in sources:
                try:
                    next(batches(source, phase.clips, 1, seed=0))
                except ValueError as error:
                    raise ValueError(f"{phase.name} finds no clip to train on: {error}") from None

"""The training loop. `train` goes through the phases of a recipe, `run_phase` is one of them from top to
bottom.

A run is a folder:
    model/          the model folder so far: each phase reads what it needs there and writes what it made
    <phase>/        state.pt to resume from, log.jsonl, loss.png, strips/
Killed at any time, the same command goes on where the last save was. Of several processes (`parallel.py`) the
first one writes; what needs the shards of all is called by all.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cogvideo.data.clips import Source
from cogvideo.data.loader import Batch, batches
from cogvideo.hardware import free_memory
from cogvideo.layout import SECONDS
from cogvideo.model.direct import Direct
from cogvideo.model.system import Family
from cogvideo.model.transformer import Base, TemporalChannel
from cogvideo.text import TextTokenizer
from cogvideo.train import checkpoint, inherit, parallel
from cogvideo.train.optim import learning_rate, optimizers, set_rate
from cogvideo.train.recipes import Phase, Recipe
from cogvideo.train.report import Report, draw_curve
from cogvideo.weights import ModelFolder

LOOKED_AT = 2_000  # captions of a source without end, for their length
MOST_SKIPPED = 20  # steps in a row whose gradients overflow

# what shows how a phase is doing: (model folder, parts, phase, batch, picture to write)
Probe = Callable[[ModelFolder, dict[str, nn.Module], Phase, Batch, Path], None]


def train(
    recipe: Recipe,
    out: Path,
    source: Source,
    system: Family,
    phases: list[Phase],
    *,
    device: torch.device | str = "cpu",
    recompute: bool = False,
    compile: bool = False,
    workers: int = 0,
    save_every: int = 250,
    log_every: int = 25,
    probe_every: int = 1000,
    probe: Probe | None = None,
    quiet: bool = False,
    init: ModelFolder | None = None,
    init_embedding: str | None = None,
) -> ModelFolder:
    """Run `phases` of a recipe in the folder `out`, going on with what is there; returns the model folder.

    A new run begins with what `init` has of the model's parts, and with GPT-2's embedding of words if
    `init_embedding` is a file of it (`inherit.py`).

    Started by torchrun, this is one of several processes: they share each batch of a phase, which must divide
    by their number (ValueError), and all must see `out`. `recompute` saves memory for time,
    `compile` time for a slow start; both change no result but by rounding.
    """
    machine = parallel.start(device, recompute, compile)
    folder = ModelFolder(out / "model")
    try:
        phases = remaining(recipe, [phase.over(source.count) for phase in phases], folder)
        for phase in phases:
            machine.share(phase)
            phase.check(system)
        check_parts(folder, phases, init)
        check_begun(recipe, phases, folder)
        check_memory(phases, system, machine)
        inherit.check(folder, recipe, system, init, init_embedding)
        check_data(phases, source)
        if machine.first:
            inherit.prepare(folder, recipe, system, source, init, init_embedding)
        machine.wait()
        text = folder.text()
        if machine.first and not quiet:
            warn_of_long_captions(text, source, system)
        for number, phase in enumerate(recipe.phases):
            chosen = next((p for p in phases if p.name == phase.name), None)
            if chosen is not None:
                run_phase(
                    chosen,
                    folder,
                    out / phase.name,
                    source,
                    text,
                    machine,
                    before=came_before(recipe, phase, out),
                    seed=recipe.seed + 1000 * number,
                    workers=workers,
                    save_every=save_every,
                    log_every=log_every,
                    probe_every=probe_every,
                    probe=probe,
                    quiet=quiet,
                )
    finally:
        parallel.stop(machine)
    return folder


def begun(phases: Iterable[Phase], phase: Phase, out: Path) -> Iterator[Path]:
    """The states of those phases that train what `phase` trains."""
    states = (out / other.name / "state.pt" for other in phases if {*other.trains} & {*phase.trains})
    return (state for state in states if state.exists())


def came_before(recipe: Recipe, phase: Phase, out: Path) -> Path | None:
    """The state of the last phase before this one that trains what it trains."""
    names = [other.name for other in recipe.phases]
    return next(begun(recipe.phases[: names.index(phase.name)][::-1], phase, out), None)


def finished(folder: ModelFolder) -> dict[str, dict]:
    """The phases that came to their end, with their steps."""
    return folder.config.get("trained", {}) if (folder.path / "config.json").exists() else {}


def remaining(recipe: Recipe, phases: list[Phase], folder: ModelFolder) -> list[Phase]:
    """Those that are not at their last step. ValueError if one would go on whose outcome another phase went
    on from: it would be lost."""
    out, found = folder.path.parent, []
    trained = finished(folder)
    for phase in phases:
        if trained.get(phase.name, {}).get("steps", 0) >= phase.steps and any(begun([phase], phase, out)):
            continue
        names = [other.name for other in recipe.phases]
        for state in begun(recipe.phases[names.index(phase.name) + 1 :], phase, out):
            raise ValueError(f"{phase.name} cannot go on, for {state.parent.name} has gone on from it; "
                             f"delete {state.parent} to train it again after {phase.name}")
        found.append(phase)
    return found


def check_begun(recipe: Recipe, phases: list[Phase], folder: ModelFolder) -> None:
    """Raise ValueError if a phase would go on from one that was stopped before its end."""
    done = {*finished(folder), *(phase.name for phase in phases)}
    for phase in phases:
        before = came_before(recipe, phase, folder.path.parent)
        if before is not None and before.parent.name not in done:
            raise ValueError(f"{phase.name} would go on from {before.parent.name}, which was stopped before "
                             f"its end; finish that first, or delete {before.parent}")


def check_parts(folder: ModelFolder, phases: list[Phase], init: ModelFolder | None = None) -> None:
    """Raise ValueError if a phase uses a part that is not there and that no phase before it makes."""
    made = {part for part in (init.system().parts if init else ()) if init and init.has(part)}
    for phase in phases:
        inherited = [phase.inherits] if phase.inherits and not folder.has(phase.trains[0]) else []
        for part in (*phase.uses, *inherited):
            if part not in made and part not in phase.trains and not folder.has(part):
                raise ValueError(f"the phase {phase.name} needs the part {part}, which is not in "
                                 f"{folder.path}; train the phase that makes it first")
        made |= set(phase.trains)


def check_memory(phases: list[Phase], system: Family, machine: parallel.Machine) -> None:
    """Raise ValueError where not even weights, gradients and the optimizer's averages fit."""
    free = free_memory(machine.device)
    for phase in phases:
        numbers = sum(shape.numel() for part in phase.trains for shape in system.shapes(part).values())
        due = 4 * numbers * (4 if phase.optimizer == "adamw" else 3) / machine.ranks
        if free is not None and due > free:
            raise ValueError(f"{phase.name} needs {due / 1e9:.1f} GB for weights, gradients and averages "
                             f"alone, and {free / 1e9:.1f} GB are free; choose a smaller preset, or more "
                             f"devices")


def check_data(phases: list[Phase], source: Source) -> None:
    """Raise ValueError if there is nothing that a phase could cut its clips from."""
    for phase in phases:
        try:
            next(batches(source, phase.cut, 1, seed=0))
        except ValueError as error:
            raise ValueError(f"{phase.name} finds no clip to train on: {error}") from None


def warn_of_long_captions(text: TextTokenizer, source: Source, system: Family) -> None:
    """Say how many captions will be cut."""
    count, length = source.count or LOOKED_AT, system.speaks.text_len
    captions = (source.caption(i, np.random.default_rng((0, i))) for i in range(count))
    if long := sum(len(text.prompt(caption, SECONDS, system.template)) > length for caption in captions):
        print(f"{long} of {count} captions are longer than {length} tokens, and will be cut")


def run_phase(
    phase: Phase,
    folder: ModelFolder,
    out: Path,
    source: Source,
    text: TextTokenizer,
    machine: parallel.Machine,
    *,
    before: Path | None,
    seed: int,
    workers: int,
    save_every: int,
    log_every: int,
    probe_every: int,
    probe: Probe | None,
    quiet: bool,
) -> None:
    """Train one phase to its last step, save what it made into the model folder. `before` is the state of the
    phase that it goes on from."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    parts = {name: folder.load(name) for name in phase.uses if name not in phase.trains}
    learning = {name: fresh_part(folder, name, phase, seed, before) for name in phase.trains}
    parts |= learning
    for part in learning.values():
        part.requires_grad_(True).train()
    model = parallel.Step(parts, partial(phase.objective, parts, text, phase))
    parallel.place(model, machine, phase.precision)
    container = nn.ModuleDict(learning)
    optims = optimizers(container, phase.optimizer, phase.weight_decay, phase.betas)
    parallel.gather_for_muon(optims)
    first = checkpoint.resume(out / "state.pt", learning, optims, machine)
    mine, rank = machine.share(phase), machine.rank
    loader = batches(
        source, phase.cut, mine, seed=seed, step=first, rank=rank, ranks=machine.ranks, workers=workers
    )
    report = Report(out, phase.name, phase.steps, phase.batch, log_every, quiet, first)
    passed = {**source.skipped}  # recordings without use, and why
    weights = [p for p in container.parameters() if p.requires_grad]
    skipped = 0  # steps in a row

    for step in range(first, phase.steps):
        batch = next(loader)
        passed |= batch.skipped
        batch = replace(batch, frames=tuple(f.to(machine.device) for f in batch.frames))
        torch.manual_seed(hash((seed, step, rank)) % 2**31)  # for dropout
        generator = torch.Generator().manual_seed(hash((seed, step)) % 2**31)
        torch.rand(rank * mine, generator=generator)  # a number a clip: go to those of this process
        lr = learning_rate(step, phase.steps, phase.lr, phase.warmup, phase.decay, phase.schedule)
        set_rate(optims, lr)
        with machine.arithmetic(phase.precision):
            loss, numbers = model(batch, step, generator)
            loss.backward()
        norm = parallel.whole(nn.utils.clip_grad_norm_(weights, phase.clip))
        if torch.isfinite(norm):  # a step whose gradients overflow is skipped
            skipped = 0
            for optimizer in optims:
                optimizer.step()
        elif (skipped := skipped + 1) == MOST_SKIPPED:
            raise ValueError(f"{phase.name}: {skipped} steps in a row overflowed; go on from the last save "
                             f"with a lower --{phase.name}.lr, or --{phase.name}.precision float32")
        container.zero_grad(set_to_none=True)
        numbers = machine.mean({"loss": float(loss.detach()), **numbers})
        if machine.first:
            report.step(step, lr, {**numbers, "norm": float(norm)})
        done = step + 1 == phase.steps
        if done or (step + 1) % save_every == 0:
            checkpoint.save(out / "state.pt", step + 1, learning, optims, machine)
            passed = machine.union(passed)
            if machine.first:
                report.skip(passed)
                draw_curve(out / "log.jsonl", out / "loss.png")
        if probe is not None and (done or (step + 1) % probe_every == 0):
            container.eval()
            shown = checkpoint.unshard(parts, machine, folder.system())
            if machine.first:
                (out / "strips").mkdir(exist_ok=True)
                probe(folder, shown, phase, batch, out / "strips" / f"{step + 1:07d}.png")
            container.train()

    for name, part in checkpoint.unshard(learning, machine, folder.system()).items():
        folder.save(name, part)
    if machine.first:
        report.end()
        config = folder.config
        config["trained"][phase.name] = {
            "steps": phase.steps,
            "batch": phase.batch,
            "parts": list(phase.trains),
        }
        folder.write_config(config)
    machine.wait()


def fresh_part(folder: ModelFolder, name: str, phase: Phase, seed: int, before: Path | None) -> nn.Module:
    """A part to begin with: that of the phase before it, or what is there of it, else new weights, or a copy
    of what the phase inherits."""
    if before is not None:
        part = inherit.new_part(folder.system(), name, seed)
        part.load_state_dict(checkpoint.read(before)["parts"][name])
    elif folder.has(name):
        part = folder.load(name)
    else:
        part = inherit.new_part(folder.system(), name, seed)
        if isinstance(part, TemporalChannel) and phase.inherits:
            parent = folder.load(phase.inherits)
            part.inherit(parent) if isinstance(parent, Base) else part.load_state_dict(parent.state_dict())
    if isinstance(part, Direct):
        part.get_ready(rate := phase.cut.rates[0], part.config.slots(rate)[: phase.cut.keep])
    return part

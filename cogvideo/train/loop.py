"""The training loop. `train` goes through the phases of a recipe, `run_phase` is one of them from top to
bottom.

A run is a folder:
    model/          the model folder so far: each phase reads what it needs there and writes what it made
    <phase>/        state.pt to resume from, log.jsonl, loss.png, strips/
Killed at any time, the same command goes on where the last save was. Of several processes (`parallel.py`) the
first one writes; what needs the shards of all is called by all.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cogvideo.data.cut import Source
from cogvideo.data.loader import Batch, batches
from cogvideo.data.tokens import Reuse, recurring
from cogvideo.hardware import find_device, free_memory, gemm_rate
from cogvideo.layout import SECONDS
from cogvideo.model.families import Spec
from cogvideo.model.folder import ModelFolder
from cogvideo.model.regression import RegressionTransformer
from cogvideo.text import TextTokenizer
from cogvideo.train import checkpoint, inherit, parallel
from cogvideo.train.cost import clip_flops
from cogvideo.train.discriminator import new_discriminator
from cogvideo.train.objectives import encode_clips
from cogvideo.train.optim import learning_rate, optimizers, set_rate
from cogvideo.train.phase import Phase
from cogvideo.train.recipes import Recipe
from cogvideo.train.report import Report, draw_curve

LOOKED_AT = 2_000  # captions of a source without end, for their length
MOST_SKIPPED = 20  # steps in a row whose gradients overflow

# what shows how a phase is doing: (model folder, parts, phase, batch, picture to write)
Probe = Callable[[ModelFolder, dict[str, nn.Module], Phase, Batch, Path], None]


def train(
    recipe: Recipe,
    out: Path,
    source: Source,
    spec: Spec,
    phases: list[Phase],
    *,
    device: torch.device | str = "cpu",
    recompute: bool = False,
    compile: bool = False,
    shard: bool = False,
    processes: int = 1,
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

    `processes` share each batch of a phase, which must divide by their number (ValueError): this one and
    others that it starts. Started by torchrun, this is one of several already, and `processes` is not asked;
    all must see `out`. `shard` cuts the weights among the processes (so does this where whole ones would not
    fit), `recompute` saves memory for time, `compile` time for a slow start; none changes a result but by
    rounding.
    """
    folder = ModelFolder(out / "model")
    started = "RANK" in os.environ  # by torchrun
    ranks = int(os.environ["WORLD_SIZE"]) if started else processes
    device = find_device(device)
    if device.type == "cuda" and not started and processes > (count := torch.cuda.device_count()):
        raise ValueError(f"{processes} processes need a device each, and there are {count}")
    phases = remaining(recipe, [phase.over(source.count) for phase in phases], folder)
    for phase in phases:
        parallel.share(phase, ranks)
        phase.check(spec)
    check_parts(folder, phases, init)
    check_begun(recipe, phases, folder)
    shard = check_memory(phases, spec, device, ranks, shard)
    for phase in phases:
        parallel.share(phase, ranks, shard)
    inherit.check(folder, recipe, spec, init, init_embedding)
    check_data(phases, source)

    work = partial(
        run,
        recipe,
        out,
        source,
        spec,
        phases,
        device=device,
        recompute=recompute,
        compile=compile,
        shard=shard,
        workers=workers,
        save_every=save_every,
        log_every=log_every,
        probe_every=probe_every,
        probe=probe,
        quiet=quiet,
        init=init,
        init_embedding=init_embedding,
    )
    with parallel.launch(1 if started or not phases else processes, work) as member:
        work(member)
    return folder


def run(
    recipe: Recipe,
    out: Path,
    source: Source,
    spec: Spec,
    phases: list[Phase],
    member: parallel.Member | None,
    *,
    device: torch.device,
    recompute: bool,
    compile: bool,
    shard: bool,
    quiet: bool,
    init: ModelFolder | None,
    init_embedding: str | None,
    **options: Any,
) -> None:
    """What each process does of `train`, once all is checked."""
    folder = ModelFolder(out / "model")
    machine = parallel.start(device, recompute, compile, shard, member)
    try:
        if machine.first:
            inherit.prepare(folder, recipe, spec, source, init, init_embedding)
        machine.wait()
        text = folder.text()
        if machine.first and not quiet:
            warn_of_long_captions(text, source, spec)
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
                    quiet=quiet,
                    **options,
                )
    finally:
        parallel.stop(machine)


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
            raise ValueError(
                f"{phase.name} cannot go on, for {state.parent.name} has gone on from it; "
                f"delete {state.parent} to train it again after {phase.name}"
            )
        found.append(phase)
    return found


def check_begun(recipe: Recipe, phases: list[Phase], folder: ModelFolder) -> None:
    """Raise ValueError if a phase would go on from one that was stopped before its end."""
    done = {*finished(folder), *(phase.name for phase in phases)}
    for phase in phases:
        before = came_before(recipe, phase, folder.path.parent)
        if before is not None and before.parent.name not in done:
            raise ValueError(
                f"{phase.name} would go on from {before.parent.name}, which was stopped before "
                f"its end; finish that first, or delete {before.parent}"
            )


def check_parts(folder: ModelFolder, phases: list[Phase], init: ModelFolder | None = None) -> None:
    """Raise ValueError if a phase uses a part that is not there and that no phase before it makes."""
    made = {part for part in (init.spec().parts if init else ()) if init and init.has(part)}
    for phase in phases:
        inherited = [phase.inherits] if phase.inherits and not folder.has(phase.trains[0]) else []
        for part in (*phase.uses, *inherited):
            if part not in made and part not in phase.trains and not folder.has(part):
                raise ValueError(
                    f"the phase {phase.name} needs the part {part}, which is not in "
                    f"{folder.path}; train the phase that makes it first"
                )
        made |= set(phase.trains)


def check_memory(phases: list[Phase], spec: Spec, device: torch.device, ranks: int, shard: bool) -> bool:
    """Whether weights must be cut into shards: if `shard` asks for it, or if not every process has room for
    whole weights, gradients and the optimizer's averages. Raise ValueError where not even shards of those
    fit."""
    free = free_memory(device)
    for phase in phases:
        numbers = sum(shape.numel() for part in phase.trains for shape in spec.shapes(part).values())
        due = 4 * numbers * (4 if phase.optimizer == "adamw" else 3)
        copies = ranks if device.type == "cpu" else 1  # which share the memory
        if free is not None and due * copies > free:
            shard = ranks > 1
        if free is not None and due * copies / ranks > free:
            raise ValueError(
                f"{phase.name} needs {due * copies / ranks / 1e9:.1f} GB for weights, gradients "
                f"and averages alone, and {free / 1e9:.1f} GB are free; choose a smaller "
                f"preset, or more devices"
            )
    return shard


def check_data(phases: list[Phase], source: Source) -> None:
    """Raise ValueError if there is nothing that a phase could cut its clips from."""
    for phase in phases:
        try:
            next(batches(source, phase.cut, 1, seed=0))
        except ValueError as error:
            raise ValueError(f"{phase.name} finds no clip to train on: {error}") from None


def warn_of_long_captions(text: TextTokenizer, source: Source, spec: Spec) -> None:
    """Say how many captions will be cut."""
    count, length = source.count or LOOKED_AT, spec.speaks.text_len
    captions = (source.caption(i, np.random.default_rng((0, i))) for i in range(count))
    if long := sum(len(text.prompt(caption, SECONDS, spec.template)) > length for caption in captions):
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
    if phase.adversary:
        learning["discriminator"] = new_discriminator(seed)
    parts |= learning
    for part in learning.values():
        part.requires_grad_(True).train()
    model = parallel.Step(parts, partial(phase.objective, parts, text, phase))
    parallel.place(model, machine, phase.precision)
    container = nn.ModuleDict(learning)
    optims = optimizers(container, phase.optimizer, phase.weight_decay, phase.betas)
    parallel.share_muon(optims, machine)
    first = checkpoint.resume(out / "state.pt", learning, optims, machine)
    mine, rank = parallel.share(phase, machine.ranks, machine.mesh is not None), machine.rank
    share = {"seed": seed, "step": first, "rank": rank, "ranks": machine.ranks, "workers": workers}
    if phase.reuse == 1:
        loader = batches(source, phase.cut, mine, **share)
    else:
        encode = partial(encode_here, parts, machine, phase.precision)
        loader = recurring(source, phase.cut, mine, Reuse(phase.reuse), encode, **share)
    peak = machine.total(gemm_rate(machine.device, phase.precision))
    flops = clip_flops(phase, parts)
    passed = {**source.skipped}  # recordings without use, and why
    weights = [p for p in container.parameters() if p.requires_grad]
    report = Report(
        out,
        phase.name,
        phase.steps,
        phase.batch,
        log_every,
        quiet,
        peak_clips=peak / flops if flops else None,
    )
    if machine.first:
        report.forget(first)
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
        machine.average_gradients(weights)
        norm = parallel.whole(nn.utils.clip_grad_norm_(weights, phase.clip))
        if torch.isfinite(norm):  # a step whose gradients overflow is skipped
            skipped = 0
            for optimizer in optims:
                optimizer.step()
        elif (skipped := skipped + 1) == MOST_SKIPPED:
            raise ValueError(
                f"{phase.name}: {skipped} steps in a row overflowed; go on from the last save "
                f"with a lower --{phase.name}.lr, or --{phase.name}.precision float32"
            )
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
            of_model = {name: part for name, part in parts.items() if name != "discriminator"}
            shown = checkpoint.unshard(of_model, machine, folder.spec())
            if machine.first:
                (out / "strips").mkdir(exist_ok=True)
                probe(folder, shown, phase, batch, out / "strips" / f"{step + 1:07d}.png")
            container.train()

    trained = {name: learning[name] for name in phase.trains}
    for name, part in checkpoint.unshard(trained, machine, folder.spec()).items():
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


def encode_here(
    parts: dict[str, Any], machine: parallel.Machine, precision: str, clips: torch.Tensor
) -> torch.Tensor:
    """Clips [B, F, 3, R, R] to codes [B, F, N], as a step does."""
    with machine.arithmetic(precision):
        return encode_clips(parts["vqvae"], clips.to(machine.device))


def fresh_part(folder: ModelFolder, name: str, phase: Phase, seed: int, before: Path | None) -> nn.Module:
    """A part to begin with: that of the phase before it, or what is there of it, else new weights, or a copy
    of what the phase inherits."""
    if before is not None:
        part = inherit.new_part(folder.spec(), name, seed)
        part.load_state_dict(checkpoint.read(before)["parts"][name])
    elif folder.has(name):
        part = folder.load(name)
    else:
        part = inherit.new_part(folder.spec(), name, seed)
        if phase.inherits:
            parent = folder.load(phase.inherits)
            same = type(parent) is type(part)
            part.load_state_dict(parent.state_dict()) if same else part.inherit(parent)
    if isinstance(part, RegressionTransformer):
        part.get_ready(rate := phase.cut.rates[0], part.config.slots(rate)[: phase.cut.keep])
    return part

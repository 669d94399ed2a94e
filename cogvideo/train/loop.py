"""The training loop. `train` goes through the phases of a recipe, `run_phase` is one of them from top to
bottom.

A run is a folder:
    model/          the model folder so far: each phase reads what it needs there and writes what it made
    <phase>/        state.pt to resume from, log.jsonl, loss.png, strips/
Killed at any time, the same command goes on where the last save was. Of several processes (`parallel.py`) the
first one writes; what needs the shards of all is called by all.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from cogvideo.data.clips import Source
from cogvideo.data.loader import Batch, batches, read_captions
from cogvideo.layout import SECONDS
from cogvideo.model.direct import Direct
from cogvideo.model.system import Family
from cogvideo.model.transformer import Base, TemporalChannel
from cogvideo.text import TextTokenizer, split_words, train_text
from cogvideo.train import checkpoint, inherit, parallel
from cogvideo.train.optim import learning_rate, optimizers, set_rate
from cogvideo.train.recipes import Phase, Recipe
from cogvideo.train.report import Report, draw_curve
from cogvideo.weights import ModelFolder

CAPTIONS = 40_000  # that the text model is trained on
LOOKED_AT = 2_000  # for their length
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
    if init_embedding is not None and recipe.pieces:
        raise ValueError(f"the recipe {recipe.name} has words of its own; GPT-2's embedding is for recipes "
                         f"with GPT-2's words, such as direct")
    machine = parallel.start(device, recompute, compile)
    folder = ModelFolder(out / "model")
    try:
        phases = [phase.over(source.count) for phase in phases]
        for phase in phases:
            machine.share(phase)
        check_parts(folder, phases, init)
        if machine.first:
            prepare(folder, recipe, source, system, init, init_embedding)
        machine.wait()
        text = folder.text()
        if machine.first and not quiet:
            warn_of_long_captions(text, source, system.speaks.text_len)
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


def prepare(folder: ModelFolder, recipe: Recipe, source: Source, system: Family,
            init: ModelFolder | None = None, init_embedding: str | None = None) -> None:
    """Begin a model folder, if there is none: its text model, what it inherits, its configuration."""
    if (folder.path / "config.json").exists():
        return
    captions = list(read_captions(source, CAPTIONS, recipe.seed))
    words = {word for caption in captions for word in split_words(caption)}
    config = {"preset": recipe.preset, "recipe": recipe.name, "text": "sentencepiece", **system.to_dict(),
              "words": sorted(words), "trained": {}}
    if recipe.pieces == 0:
        config |= {"text": "gpt2", "words": []}  # which knows all words
    elif not (folder.path / "text.model").exists():
        folder.write_text(inherit.text_model(init, system) or train_text(captions, recipe.pieces))
    inherit.begin(folder, system, recipe.seed, init, init_embedding)
    folder.write_config(config)


def warn_of_long_captions(text: TextTokenizer, source: Source, length: int) -> None:
    """Say how many captions will be cut."""
    captions = list(read_captions(source, LOOKED_AT, 0))
    ids = [text.prompt(caption, SECONDS) for caption in captions]
    if long := sum(len(row) > length for row in ids):
        print(f"{long} of {len(captions)} captions are longer than {length} tokens, and will be cut")


def run_phase(
    phase: Phase,
    folder: ModelFolder,
    out: Path,
    source: Source,
    text: TextTokenizer,
    machine: parallel.Machine,
    *,
    seed: int,
    workers: int,
    save_every: int,
    log_every: int,
    probe_every: int,
    probe: Probe | None,
    quiet: bool,
) -> None:
    """Train one phase to its last step, save what it made into the model folder."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    parts = {name: folder.load(name) for name in phase.uses if name not in phase.trains}
    learning = {name: fresh_part(folder, name, phase, seed) for name in phase.trains}
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
    weights = [p for p in container.parameters() if p.requires_grad]
    skipped = 0  # steps in a row

    for step in range(first, phase.steps):
        batch = next(loader)
        if machine.first:
            report.skip(batch.skipped)
        batch = replace(batch, frames=tuple(f.to(machine.device) for f in batch.frames))
        torch.manual_seed(hash((seed, step, rank)) % 2**31)  # for dropout
        generator = torch.Generator().manual_seed(hash((seed, step)) % 2**31)
        torch.rand(rank * mine, generator=generator)  # a number a clip: go to those of this process
        rate = learning_rate(step, phase.steps, phase.rate, phase.warmup, phase.decay, phase.schedule)
        set_rate(optims, rate)
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
                             f"with a lower --{phase.name}.rate, or --{phase.name}.precision float32")
        container.zero_grad(set_to_none=True)
        numbers = machine.mean({"loss": float(loss.detach()), **numbers})
        if machine.first:
            report.step(step, rate, {**numbers, "norm": float(norm)})
        done = step + 1 == phase.steps
        if done or (step + 1) % save_every == 0:
            checkpoint.save(out / "state.pt", step + 1, learning, optims, machine)
            if machine.first:
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


def fresh_part(folder: ModelFolder, name: str, phase: Phase, seed: int) -> nn.Module:
    """A part to begin with: what is there of it, else new weights, or a copy of what the phase inherits."""
    if folder.has(name):
        part = folder.load(name)
    else:
        part = inherit.new_part(folder.system(), name, seed)
        if isinstance(part, TemporalChannel) and phase.inherits:
            parent = folder.load(phase.inherits)
            part.inherit(parent) if isinstance(parent, Base) else part.load_state_dict(parent.state_dict())
    if isinstance(part, Direct):
        part.reach(rate := phase.cut.rates[0], part.config.slots(rate)[: phase.cut.keep])
    return part

"""The training loop. `train` runs phases of a recipe, `train_phase` is one of them from top to bottom.

Killed at any time, the same command resumes at the last save. Of several processes (`parallel`) the first one
writes; calls that gather shards must run on every rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from cogvideo.data.loader import Batch, batches
from cogvideo.data.tokens import Reuse, recurring
from cogvideo.files import replacing
from cogvideo.hardware import gemm_rate
from cogvideo.model.folder import ModelFolder
from cogvideo.model.vqvae import VQVAE
from cogvideo.text import TextTokenizer
from cogvideo.train import checkpoint, inherit, parallel
from cogvideo.train.discriminator import new_discriminator
from cogvideo.train.inputs import Parts, encode_clips, part
from cogvideo.train.optim import learning_rate, optimizers, set_learning_rate
from cogvideo.train.phase import Phase
from cogvideo.train.report import Report, draw_curve
from cogvideo.train.run import Run

MOST_SKIPPED = 20  # steps in a row whose gradients overflow


def train(run: Run, phases: Sequence[Phase]) -> ModelFolder:
    """Train phases of a recipe and return the model folder; a run that was interrupted resumes.

    Raise ValueError, before any work, for what cannot be trained. The processes of `run.options` share each
    batch of a phase: this one and others that it starts. All must see the folder of the run.
    """
    run, phases = run.preflight(phases)
    alone = run.options.started or not phases
    work = partial(train_phases, run, phases)
    with parallel.launch(1 if alone else run.options.processes, work) as member:
        work(member)
    return run.folder


def train_phases(run: Run, phases: Sequence[Phase], member: parallel.Member | None) -> None:
    """What each process does of `train`, once all is checked."""
    options = run.options
    machine = parallel.start(options.device, options.recompute, options.compile, options.shard, member)
    try:
        if machine.first:
            inherit.prepare(
                run.folder, run.recipe, run.spec, run.source, options.init, options.init_embedding
            )
        machine.wait()
        text = run.folder.text()
        if machine.first and not options.quiet:
            run.warn_of_long_captions(text)

        chosen = {phase.name: phase for phase in phases}
        for phase in run.recipe.phases:  # in their order
            if phase.name in chosen:
                train_phase(run, chosen[phase.name], text, machine)
    finally:
        parallel.stop(machine)


def train_phase(run: Run, phase: Phase, text: TextTokenizer, machine: parallel.Machine) -> None:
    """Train one phase to its last step, and save what it trained into the model folder."""
    options = run.options
    seed = run.seed(phase)
    out = run.place(phase)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)

    given: dict[str, nn.Module] = {
        name: run.folder.load(name) for name in phase.uses if name not in phase.trains
    }
    trained = {name: run.new_part(name, phase) for name in phase.trains}
    learning = dict(trained)
    if phase.adversary:
        learning["discriminator"] = new_discriminator(seed)
    for module in learning.values():
        module.requires_grad_(True).train()

    parts = given | learning
    model = parallel.Step(parts, partial(phase.objective.loss, parts, text, phase))
    parallel.place(model, machine, phase.precision)
    container = nn.ModuleDict(learning)
    weights = [p for p in container.parameters() if p.requires_grad]
    optims = optimizers(container, phase.optimizer, phase.weight_decay, phase.betas)
    parallel.share_muon(optims, machine)
    first = checkpoint.resume(run.state(phase), learning, optims, machine)
    loader = clips(run, phase, parts, machine, first)
    report = new_report(run, phase, parts, machine)
    if machine.first:
        report.forget(first)
    unusable = dict(run.source.skipped)  # videos, and why
    overflows = 0  # steps in a row

    for step in range(first, phase.steps):
        batch = next(loader)
        unusable |= batch.skipped
        batch = replace(batch, frames=tuple(frames.to(machine.device) for frames in batch.frames))
        torch.manual_seed(hash((seed, step, machine.rank)) % 2**31)  # for dropout
        lr = learning_rate(step, phase.steps, phase.lr, phase.warmup, phase.decay, phase.schedule)
        set_learning_rate(optims, lr)

        with machine.arithmetic(phase.precision):
            loss, numbers = model(batch, step)
            loss.backward()
        machine.average_gradients(weights)
        norm = parallel.whole(nn.utils.clip_grad_norm_(weights, phase.clip))
        if torch.isfinite(norm):
            overflows = 0
            for optimizer in optims:
                optimizer.step()
        else:  # the step is skipped
            overflows += 1
            if overflows == MOST_SKIPPED:
                raise ValueError(
                    f"{phase.name}: {overflows} steps in a row overflowed; resume at the last save "
                    f"with a lower --{phase.name}.lr, or --{phase.name}.precision float32"
                )
        container.zero_grad(set_to_none=True)

        numbers = machine.mean({"loss": float(loss.detach()), **numbers})
        if machine.first:
            report.step(step, lr, {**numbers, "norm": float(norm)})

        done = step + 1 == phase.steps
        if done or (step + 1) % options.save_every == 0:
            checkpoint.save(run.state(phase), step + 1, learning, optims, machine)
            unusable = machine.union(unusable)
            if machine.first:
                report.skip(unusable)
                draw_curve(out / "log.jsonl", out / "loss.png")
        if options.probe is not None and (done or (step + 1) % options.probe_every == 0):
            container.eval()
            preview(run, phase, given | trained, batch, machine, step + 1)
            container.train()

    save_trained(run, phase, trained, machine)
    if machine.first:
        report.end()
    machine.wait()


def clips(run: Run, phase: Phase, parts: Parts, machine: parallel.Machine, first: int) -> Iterator[Batch]:
    """The batches of this process from step `first` on."""
    mine = parallel.share(phase, machine.ranks, machine.mesh is not None)
    if phase.reuse == 1:
        return batches(
            run.source,
            phase.cut,
            mine,
            seed=run.seed(phase),
            step=first,
            rank=machine.rank,
            ranks=machine.ranks,
            workers=run.options.workers,
            drop=phase.drop,
        )

    def encode(frames: torch.Tensor) -> torch.Tensor:
        with machine.arithmetic(phase.precision):
            return encode_clips(part(parts, "vqvae", VQVAE), frames.to(machine.device))

    return recurring(
        run.source,
        phase.cut,
        mine,
        Reuse(phase.reuse),
        encode,
        seed=run.seed(phase),
        step=first,
        rank=machine.rank,
        ranks=machine.ranks,
        workers=run.options.workers,
        drop=phase.drop,
    )


def new_report(run: Run, phase: Phase, parts: Parts, machine: parallel.Machine) -> Report:
    peak = machine.total(gemm_rate(machine.device, phase.precision))
    flops = phase.objective.flops(phase, parts)
    return Report(
        run.place(phase),
        phase.name,
        phase.steps,
        phase.batch,
        run.options.log_every,
        run.options.quiet,
        peak_clips=peak / flops if flops else None,
    )


def preview(
    run: Run, phase: Phase, parts: dict[str, nn.Module], batch: Batch, machine: parallel.Machine, step: int
) -> None:
    """Show the parts as they are after a step; all processes call this, the first one writes."""
    whole = checkpoint.unshard(parts, machine, run.folder.spec())
    if machine.first and run.options.probe is not None:
        strips = run.place(phase) / "strips"
        strips.mkdir(exist_ok=True)
        run.options.probe(run.folder, whole, phase, batch, strips / f"{step:07d}.png")


@torch.inference_mode()
def write_preview(folder: ModelFolder, parts: Parts, phase: Phase, batch: Batch, out: Path) -> None:
    """The probe of the command line: the preview of the phase, as an image."""
    image = phase.objective.preview(folder, parts, phase, batch)
    with replacing(out) as file:
        Image.fromarray(image).save(file)


def save_trained(run: Run, phase: Phase, parts: dict[str, nn.Module], machine: parallel.Machine) -> None:
    """Write what a phase trained into the model folder; all processes call this, the first one writes."""
    for name, module in checkpoint.unshard(parts, machine, run.folder.spec()).items():
        run.folder.save(name, module)
    if machine.first:
        config = run.folder.config
        config["trained"][phase.name] = {
            "steps": phase.steps,
            "batch": phase.batch,
            "parts": list(phase.trains),
        }
        run.folder.write_config(config)

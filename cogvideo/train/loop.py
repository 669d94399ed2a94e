"""The training loop. `train` runs the phases of a `Run`; `run_phase` is one of them: set up, loop, store.

An interrupted run resumes at its last save when the same command runs again. Of several processes
(`peers.py`) the first one writes files; calls that save or gather must run on every rank.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cogvideo.cluster import place_of_torchrun
from cogvideo.data.cut import Source
from cogvideo.data.loader import Batch, batches, by_turns, read_captions
from cogvideo.data.tokens import Reuse, recurring
from cogvideo.files import only_writer, remove_parts
from cogvideo.hardware import chosen_precision, gemm_rate
from cogvideo.layout import SECONDS
from cogvideo.model import lora
from cogvideo.model.config import TrainedPhase
from cogvideo.model.families import Spec
from cogvideo.model.folder import ModelFolder
from cogvideo.model.vqvae import VQVAE
from cogvideo.text import TextTokenizer
from cogvideo.train import inherit, muon, parallel, peers
from cogvideo.train.checkpoint import Checkpoint, export
from cogvideo.train.inputs import Parts, encode_clips, part
from cogvideo.train.mesh import local_batch
from cogvideo.train.optim import learning_rate, optimizers, set_learning_rate
from cogvideo.train.phase import Phase
from cogvideo.train.report import Report, draw_curve
from cogvideo.train.run import Run

CAPTION_SAMPLE = 2_000  # captions of endless data whose length is checked
COMPARED = 4  # prompts that are shown without an adapter and with it
MAX_OVERFLOWS = 20  # steps in a row


def train(run: Run) -> ModelFolder:
    """Train the phases of a run that are not finished, each from its last save; return the model folder.
    ValueError for what cannot be trained, and if another process trains there, before work starts.

    A new run begins with what `options.init` has of the model's parts, and with GPT-2's embedding of words if
    `options.init_embedding` is a file of it (`inherit.py`). `options.processes` share each batch: this one
    and others that it starts. Under torchrun this is one of several already; all must see `out`.
    """
    first = place_of_torchrun() in (None, (0, run.ranks))
    with only_writer(run.out) if first else nullcontext():
        run = run.preflight()
        if run.options.threads is not None:
            torch.set_num_threads(run.options.threads)
        processes = 1 if run.by_torchrun or not run.phases else run.ranks
        active = partial(run_phases, run)
        with peers.launch(processes, active) as worker:
            active(worker)
    return run.folder


def run_phases(run: Run, worker: peers.Worker | None) -> None:
    """The share of one process in a run that has been checked."""
    options = run.options
    distributed = peers.start(options.device, options.recompute, options.compile, run.mesh, worker)
    try:
        if distributed.first:
            for folder in {run.out, run.folder.path, *(run.out / phase.name for phase in run.phases)}:
                if folder.is_dir():
                    remove_parts(folder)
            inherit.prepare(
                run.folder, run.recipe, run.spec, run.source, options.init, options.init_embedding
            )
        distributed.wait()
        text = run.folder.text()
        if distributed.first and not options.quiet:
            warn_of_long_captions(text, run.source, run.spec)
        chosen = {phase.name: phase for phase in run.phases}
        for name in (phase.name for phase in run.recipe.phases):
            if name in chosen:
                run_phase(run, chosen[name], text, distributed)
    finally:
        peers.stop(distributed)


def run_phase(run: Run, phase: Phase, text: TextTokenizer, distributed: peers.Distributed) -> None:
    """Train one phase to its last step, and write its parts into the model folder."""
    active = begin(run, phase, text, distributed)
    loop_over_steps(active)
    finish(active)


@dataclass
class ActivePhase:
    """A phase at work in one process."""

    run: Run
    phase: Phase
    distributed: peers.Distributed
    out: Path
    parts: dict[str, nn.Module]  # all that the objective uses
    learning: dict[str, nn.Module]  # those that learn
    model: parallel.TrainStep
    container: nn.ModuleDict  # of `learning`
    optims: list[torch.optim.Optimizer]
    checkpoint: Checkpoint
    first: int  # step
    loaders: list[Iterator[Batch]]  # one for each share of this process
    report: Report
    skipped: dict[str, str]  # videos, and why

    @property
    def weights(self) -> list[nn.Parameter]:
        return [p for p in self.container.parameters() if p.requires_grad]


def begin(run: Run, phase: Phase, text: TextTokenizer, distributed: peers.Distributed) -> ActivePhase:
    """Load and place the parts of a phase, resume its last save, open its data and its report."""
    out = run.out / phase.name
    out.mkdir(parents=True, exist_ok=True)
    seed = run.seed(phase)
    torch.manual_seed(seed)
    folder = run.folder
    parts: dict[str, nn.Module] = {name: folder.load(name) for name in phase.uses if name not in phase.trains}
    learning = {name: run.new_part(phase, name) for name in phase.trains}
    learning |= phase.objective.extra_parts(phase, seed)
    for module in learning.values():
        module.requires_grad_(True).train()
    if run.options.lora:
        adapt(run, parts, learning, seed)
    parts |= learning

    model = parallel.TrainStep(parts, partial(phase.objective.build_loss, parts, text, phase))
    parallel.to_devices(model, distributed, phase.precision, whole_matrices=phase.optimizer == "muon")
    container = nn.ModuleDict(learning)
    optims = optimizers(container, phase.optimizer, phase.weight_decay, phase.betas)
    muon.share_muon(optims, distributed)
    checkpoint = Checkpoint(out, learning, optims, distributed)
    first = checkpoint.resume()

    loaders = open_data(run, phase, parts, distributed, first)
    report = open_report(run, phase, parts, distributed)
    if distributed.first:
        report.forget(first)
    return ActivePhase(
        run=run,
        phase=phase,
        distributed=distributed,
        out=out,
        parts=parts,
        learning=learning,
        model=model,
        container=container,
        optims=optims,
        checkpoint=checkpoint,
        first=first,
        loaders=loaders,
        report=report,
        skipped={**run.source.skipped},
    )


def adapt(run: Run, parts: Parts, learning: Parts, seed: int) -> None:
    """Attach adapters to the parts that learn; the others get what earlier phases learnt."""
    earlier = run.adapter()
    if earlier is not None:
        for name, module in parts.items():
            lora.merge(module, lora.weighted([(earlier, 1.0)], name))
    for module in learning.values():
        lora.attach(module, run.options.lora, seed)


def open_data(
    run: Run, phase: Phase, parts: Parts, distributed: peers.Distributed, first: int
) -> list[Iterator[Batch]]:
    """This process's batches of a phase, starting at step `first`: one iterator for each share that it takes
    of a step, as if it were as many processes. Half of each batch are clips to rehearse, if there are any."""
    local = local_batch(phase, run.takers, distributed.mesh is not None)
    encode = partial(encode_here, parts, distributed, phase.precision)
    loaders = []
    for share in range(run.options.accumulate):
        options: dict[str, Any] = {
            "seed": run.seed(phase),
            "step": first,
            "rank": distributed.data_rank * run.options.accumulate + share,
            "ranks": run.takers,
            "workers": run.options.workers or 0,
            "drop": phase.drop,
        }

        if run.rehearsal is None:
            loaders.append(open_clips(run.source, phase, local, encode, options))
        else:
            new = open_clips(run.source, phase, local - local // 2, encode, options)
            known = open_clips(run.rehearsal, phase, local // 2, encode, options)
            loaders.append(map(by_turns, new, known))
    return loaders


def open_clips(
    source: Source, phase: Phase, count: int, encode: Callable[[Tensor], Tensor], options: dict[str, Any]
) -> Iterator[Batch]:
    """Batches of `count` clips of a source, which recur if the phase uses each several times."""
    if phase.reuse == 1:
        return batches(source, phase.clips, count, **options)
    return recurring(source, phase.clips, count, Reuse(phase.reuse), encode, **options)


def open_report(run: Run, phase: Phase, parts: Parts, distributed: peers.Distributed) -> Report:
    device = distributed.device
    peak = distributed.total(gemm_rate(device, chosen_precision(phase.precision, device)))
    flops = phase.objective.clip_flops(phase, parts)
    return Report(
        run.out / phase.name,
        phase.name,
        phase.steps,
        phase.batch,
        run.options.log_every,
        run.options.quiet,
        peak_clips=peak / flops if flops else None,
    )


def loop_over_steps(active: ActivePhase) -> None:
    """Take the steps of a phase that remain; log, save and preview on the way."""
    phase = active.phase
    distributed = active.distributed
    options = active.run.options
    weights = active.weights
    overflows = 0  # in a row

    for step in range(active.first, phase.steps):
        lr = learning_rate(step, phase.steps, phase.lr, phase.warmup, phase.decay, phase.schedule)
        set_learning_rate(active.optims, lr)
        rows = []
        for share, loader in enumerate(active.loaders):
            batch = next(loader)
            active.skipped |= batch.skipped
            rows.append(add_gradients(active, step, share, batch))
        distributed.average_gradients(weights)
        norm = parallel.clip_gradients(weights, phase.clip)

        if torch.isfinite(norm):
            overflows = 0
            for optimizer in active.optims:
                optimizer.step()
        else:  # the step is skipped
            overflows += 1
            check_overflows(phase, overflows)
        active.container.zero_grad(set_to_none=True)

        numbers = distributed.mean(*rows)
        if distributed.first:
            active.report.step(step, lr, {**numbers, "norm": float(norm)})
        done = step + 1 == phase.steps
        if options.probe is not None and (done or (step + 1) % options.probe_every == 0):
            preview(active, step + 1, batch)
        if done or (step + 1) % options.save_every == 0:
            save(active, step + 1)
    active.checkpoint.close()


def add_gradients(active: ActivePhase, step: int, share: int, batch: Batch) -> dict[str, float]:
    """Add the gradients of a share of a step to those of the shares before; return its loss and numbers."""
    distributed = active.distributed
    count = len(active.loaders)
    batch = replace(batch, frames=tuple(f.to(distributed.device) for f in batch.frames))
    if batch.codes is not None:
        batch = replace(batch, codes=batch.codes.to(distributed.device))
    taker = distributed.data_rank * count + share
    torch.manual_seed(hash((active.run.seed(active.phase), step, taker)) % 2**31)  # for dropout
    parallel.send_gradients(active.model, last=share + 1 == count)
    with distributed.arithmetic(active.phase.precision):
        loss, numbers = active.model(batch, step)
        (loss / count).backward()
    return {"loss": float(loss.detach()), **numbers}


def check_overflows(phase: Phase, overflows: int) -> None:
    """Raise ValueError if too many steps in a row overflowed."""
    if overflows >= MAX_OVERFLOWS:
        raise ValueError(
            f"{phase.name}: {overflows} steps in a row overflowed; resume from the last save "
            f"with a lower --{phase.name}.lr, or --{phase.name}.precision float32"
        )


def save(active: ActivePhase, step: int) -> None:
    """Draw the loss curve, and write what the phase can resume from; all processes call this. The checkpoint
    comes last: a run that is killed before it repeats the steps, and so all that they write."""
    active.skipped = active.distributed.union(active.skipped)
    if active.distributed.first:
        active.report.skip(active.skipped)
        draw_curve(active.out / "log.jsonl", active.out / "loss.png")
    active.checkpoint.save(step)


def preview(active: ActivePhase, step: int, batch: Batch) -> None:
    """Hand the model's parts to the probe, which writes an image of them. In a mesh there is none: no process
    has a whole model."""
    probe = active.run.options.probe
    if probe is None or active.distributed.mesh is not None or not active.distributed.first:
        return
    active.container.eval()
    known = {*active.phase.uses, *active.phase.trains}  # without what the model folder does not keep
    parts = {name: module for name, module in active.parts.items() if name in known}
    if active.run.options.lora:  # always the same, so that sheets can be compared
        batch = replace(batch, captions=list(read_captions(active.run.source, COMPARED, seed=0)))
    strips = active.out / "strips"
    strips.mkdir(exist_ok=True)
    probe(active.run.folder, parts, active.phase, batch, strips / f"{step:07d}.png")
    active.container.train()


def finish(active: ActivePhase) -> None:
    """Write the trained parts into the model folder, and note there that the phase is finished."""
    phase = active.phase
    folder = active.run.folder
    trained = {name: active.learning[name] for name in phase.trains}
    if active.run.options.lora:
        save_adapter(active, trained)
    else:
        for name, module in trained.items():
            export(folder, name, module, active.distributed)
    if active.distributed.first:
        active.report.end()
        config = folder.config
        row = TrainedPhase(phase.steps, phase.batch, phase.trains)
        folder.write_config(replace(config, trained={**(config.trained or {}), phase.name: row}))
    active.distributed.wait()


def save_adapter(active: ActivePhase, trained: dict[str, nn.Module]) -> None:
    """Write what the parts learnt into the run's adapter, and say how much it changes them. ValueError if it
    changes nothing."""
    if not active.distributed.first:
        return
    run = active.run
    config = run.folder.config
    about = {"base_model": config.begun.get("init", ""), "recipe": run.recipe.name}
    about["words"] = json.dumps(config.words, ensure_ascii=False)
    adapter = lora.Adapter.of(trained, about)
    for name, module in trained.items():
        change = adapter.relative_change(module, name)
        if not change:
            raise ValueError(f"the adapter of {name} changes nothing; train it longer, or with a higher lr")
        if not run.options.quiet:
            print(f"{name}: the adapter changes its matrices by {change:.2%} of their norm")
    earlier = run.adapter()
    if earlier is not None:
        adapter = earlier.joined(adapter)
    adapter.save(run.adapter_file.parent)


def encode_here(parts: Parts, distributed: peers.Distributed, precision: str, clips: Tensor) -> Tensor:
    """Clips [B, F, 3, R, R] to codes [B, F, N], in the arithmetic of a step."""
    with distributed.arithmetic(precision):
        return encode_clips(part(parts, "vqvae", VQVAE), clips.to(distributed.device))


def warn_of_long_captions(text: TextTokenizer, source: Source, spec: Spec) -> None:
    """Print how many captions will be truncated."""
    count = source.count or CAPTION_SAMPLE
    length = spec.text_config.text_len
    captions = (source.caption(i, np.random.default_rng((0, i))) for i in range(count))
    long = sum(len(text.prompt(caption, SECONDS, spec.template)) > length for caption in captions)
    if long:
        print(f"{long} of {count} captions are longer than {length} tokens and will be truncated")

"""How fast a recipe trains here: measured by a few real steps of each phase, in a run that is thrown away.

Weights are random and codes meaningless, which costs the same. Clips that recur are measured as if all were
new; what drawing and encoding take of that is measured by itself, and the share that is remembered is left
out.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from cogvideo.data.cut import Source
from cogvideo.data.loader import batches
from cogvideo.model.families import Spec
from cogvideo.model.folder import ModelFolder
from cogvideo.model.vqvae import VQVAE
from cogvideo.train import inherit, loop, parallel
from cogvideo.train.inputs import encode_clips, part
from cogvideo.train.phase import Phase
from cogvideo.train.recipes import Recipe
from cogvideo.train.report import read_log
from cogvideo.train.run import Options, Run, check_data

CAPTIONS = 5_000  # that the text model is trained on


@dataclass(frozen=True)
class Pace:
    """Of one phase on this machine."""

    phase: Phase
    step: float  # seconds
    mfu: float | None  # model FLOPs utilisation, of the token models

    @property
    def hours(self) -> float:
        return self.phase.steps * self.step / 3600

    @property
    def clips(self) -> float:
        """A second."""
        return self.phase.batch / self.step


def measure(
    recipe: Recipe,
    source: Source,
    spec: Spec,
    phases: Sequence[Phase],
    *,
    device: torch.device,
    processes: int,
    steps: int = 3,
    workers: int = 0,
) -> Iterator[Pace]:
    """The pace of each phase, from `steps` steps after a first one; ValueError for what cannot be trained."""
    phases = [phase.over(source.count) for phase in phases]
    for phase in phases:
        parallel.share(phase, processes)
        phase.check(spec)
    check_data(phases, source)

    never = 10**9
    options = Options(
        device,
        processes,
        workers,
        save_every=never,
        log_every=1,
        probe_every=never,
        quiet=True,
    )
    with tempfile.TemporaryDirectory() as out:
        run = Run(recipe, Path(out), source, spec, options)
        random_model(run.folder, recipe, spec, source)
        for phase in phases:
            yield _measure_phase(run, phase, steps)


def _measure_phase(run: Run, phase: Phase, steps: int) -> Pace:
    """A short run of one phase, without the checks of a real one."""
    processes = run.options.processes
    short = replace(phase, steps=steps + 1, reuse=1)
    alone = replace(run, recipe=replace(run.recipe, phases=(short,)))
    work = partial(loop.train_phases, alone, [short])
    with parallel.launch(processes, work) as member:
        work(member)

    rows = read_log(run.place(phase) / "log.jsonl")[1:]
    rows.sort(key=lambda row: row["clips_per_second"])
    middle = rows[len(rows) // 2]
    new = phase.batch / middle["clips_per_second"]  # seconds of a step whose clips are all new
    step = new
    if phase.reuse > 1:
        drawn = _new_clips(run, phase) * phase.batch / processes
        step -= min(drawn, step) * (1 - 1 / phase.reuse)
    mfu = middle["mfu"] * new / step if "mfu" in middle else None
    return Pace(phase, step, mfu)


def random_model(folder: ModelFolder, recipe: Recipe, spec: Spec, source: Source) -> None:
    """A model folder whose parts have random weights, and codes that are far from each other."""
    before, inherit.CAPTIONS = inherit.CAPTIONS, CAPTIONS
    try:
        inherit.prepare(folder, recipe, spec, source)
    finally:
        inherit.CAPTIONS = before
    for name in spec.parts:
        module = inherit.new_part(spec, name, recipe.seed)
        if isinstance(module, VQVAE):
            generator = torch.Generator().manual_seed(recipe.seed)
            c = module.config
            module.codebook.init_codes(torch.randn(c.codes, c.code_width, generator=generator), generator)
        folder.save(name, module)


def _new_clips(run: Run, phase: Phase) -> float:
    """Seconds that it takes to draw and to encode one clip."""
    device = torch.device(run.options.device)
    vqvae = part({"vqvae": run.folder.load("vqvae").to(device)}, "vqvae", VQVAE)
    clips = batches(run.source, phase.cut, 4, seed=0)
    machine = parallel.Machine(device)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        frames = next(clips).frames[0].to(device)
        with machine.arithmetic(phase.precision):
            encode_clips(vqvae, frames).cpu()
        times.append(time.perf_counter() - begin)
    return min(times) / 4


def table(paces: list[Pace]) -> str:
    lines = [f"{'phase':<12}{'steps':>8}{'s/step':>9}{'clips/s':>9}{'mfu':>6}{'hours':>8}"]
    for one in paces:
        mfu = f"{one.mfu:.0%}" if one.mfu else "-"
        lines.append(
            f"{one.phase.name:<12}{one.phase.steps:>8}{one.step:>9.2f}{one.clips:>9.1f}{mfu:>6}"
            f"{one.hours:>8.1f}"
        )
    lines.append(f"{'all':<44}{sum(one.hours for one in paces):>8.1f}")
    return "\n".join(lines)

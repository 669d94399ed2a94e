"""How fast a recipe trains here: measured by a few real steps of each phase, in a temporary run.

Weights are random and codes meaningless, which costs the same. Clips that recur are measured as if all were
new; the time to read and encode a clip is measured separately, and subtracted for the share that recurs.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from cogvideo.data.cut import Source
from cogvideo.data.loader import batches
from cogvideo.model.families import Spec
from cogvideo.model.folder import ModelFolder
from cogvideo.model.vqvae import VQVAE
from cogvideo.train import inherit, loop, peers
from cogvideo.train.inputs import encode_clips
from cogvideo.train.phase import Phase
from cogvideo.train.recipes import Recipe
from cogvideo.train.report import read_log
from cogvideo.train.run import Options, Run

CAPTIONS = 5_000  # that the text model is trained on


@dataclass(frozen=True)
class Pace:
    """How fast one phase trains on this machine."""

    phase: Phase
    step: float  # seconds
    mfu: float | None  # model FLOPs utilisation, of the token models

    @property
    def hours(self) -> float:
        return self.phase.steps * self.step / 3600

    @property
    def clips(self) -> float:
        """Clips a second."""
        return self.phase.batch / self.step


def measure(
    recipe: Recipe,
    source: Source,
    spec: Spec,
    phases: list[Phase],
    *,
    device: torch.device,
    processes: int,
    steps: int = 3,
    workers: int = 0,
) -> Iterator[Pace]:
    """The pace of each phase, from `steps` steps after a first one; ValueError for what cannot be trained."""
    with tempfile.TemporaryDirectory() as temporary:
        options = Options(
            device=device,
            processes=processes,
            workers=workers,
            quiet=True,
            save_every=10**9,
            log_every=1,
            probe_every=10**9,
        )
        run = Run(recipe, Path(temporary), source, spec, phases, options).with_steps()
        run.check_phases()
        run.check_batches()
        run.check_data()
        random_model(run.folder, recipe, spec, source)
        for phase in run.phases:
            yield _measure_phase(run, phase, steps)


def _measure_phase(run: Run, phase: Phase, steps: int) -> Pace:
    """The pace of one phase, in a short run without the checks of a real one."""
    short = replace(phase, steps=steps + 1, reuse=1)
    work = partial(loop.run_phases, replace(run, recipe=replace(run.recipe, phases=(short,)), phases=[short]))
    processes = run.options.processes or 1
    with peers.launch(processes, work) as worker:
        work(worker)
    rows = read_log(run.out / phase.name / "log.jsonl")[1:]
    middle = sorted(rows, key=lambda row: row["clips_per_second"])[len(rows) // 2]
    measured = phase.batch / middle["clips_per_second"]
    step = measured
    if phase.reuse > 1:
        device = torch.device(run.options.device)
        new_clips = _seconds_a_clip(run.folder, phase, run.source, device) * phase.batch / processes
        step -= min(new_clips, measured) * (1 - 1 / phase.reuse)
    mfu = middle["mfu"] * measured / step if "mfu" in middle else None
    return Pace(phase, step, mfu)


def random_model(folder: ModelFolder, recipe: Recipe, spec: Spec, source: Source) -> None:
    """Write a model folder whose parts have random weights, and codes that are far from each other."""
    inherit.prepare(folder, recipe, spec, source, captions=CAPTIONS)
    for name in spec.parts:
        part = inherit.new_part(spec, name, recipe.seed)
        if isinstance(part, VQVAE):
            generator = torch.Generator().manual_seed(recipe.seed)
            c = part.config
            vectors = torch.randn(c.codes, c.code_width, generator=generator)
            part.codebook.init_codes(vectors, generator)
        folder.save(name, part)


def _seconds_a_clip(folder: ModelFolder, phase: Phase, source: Source, device: torch.device) -> float:
    """Seconds to read and encode one clip."""
    vqvae = folder.load_as(VQVAE, "vqvae").to(device)
    clips = batches(source, phase.clips, 4, seed=0)
    distributed = peers.Distributed(device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        frames = next(clips).frames[0].to(device)
        with distributed.arithmetic(phase.precision):
            encode_clips(vqvae, frames).cpu()
        times.append(time.perf_counter() - began)
    return min(times) / 4


def table(paces: list[Pace]) -> str:
    """A line for each phase, and one for all."""
    lines = [f"{'phase':<12}{'steps':>8}{'s/step':>9}{'clips/s':>9}{'mfu':>6}{'hours':>8}"]
    for pace in paces:
        mfu = f"{pace.mfu:.0%}" if pace.mfu else "-"
        lines.append(
            f"{pace.phase.name:<12}{pace.phase.steps:>8}{pace.step:>9.2f}{pace.clips:>9.1f}{mfu:>6}"
            f"{pace.hours:>8.1f}"
        )
    lines.append(f"{'all':<44}{sum(pace.hours for pace in paces):>8.1f}")
    return "\n".join(lines)

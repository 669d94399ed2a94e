"""What the commands of a campaign find in their working directory, and where they end before long work.

The table of models and the recipes are those of `scripts.stand_ins`: nano models, two steps of two clips.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cogvideo.model import folder as model_folder
from cogvideo.model import presets
from cogvideo.train import inherit, objectives, recipes
from cogvideo.video import Clip
from scripts import stand_ins
from scripts.campaign.case import Case
from scripts.campaign.corpus import KINDS

BEGUN = "begun"  # where an exit code belongs: long work was about to begin
# no hub: where no network is, each question would take a minute
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


class Begun(BaseException):
    """All checks passed, and long work would begin."""


def build_ground(ground: Path) -> Path:
    """Write models, videos, prompts, a study, a checkpoint and artwork into a folder."""
    presets.PRESETS = stand_ins.nano(presets.PRESETS)
    recipes.RECIPES = {name: stand_ins.few(recipe, 16) for name, recipe in recipes.RECIPES.items()}
    recipes.ADAPTERS = dict.fromkeys(recipes.ADAPTERS, (2, 2))
    objectives.UNQUANTISED = 1
    inherit.CAPTIONS = 300
    ground.mkdir(parents=True)
    stand_ins.write_models(ground / "models")
    for model in (ground / "models").iterdir():
        (model / "README.md").write_text("---\nlicense: mit\n---\n")
    work = ground / "examples"
    for kind in ("table", "study", "checkpoint", "artwork"):
        (work / kind).mkdir(parents=True)
        KINDS[kind].write(work / kind)
    videos = ground / "videos"
    videos.mkdir()
    clip = Clip.load(work / "table" / "texts" / "a.mp4")
    for i in range(4):
        replace(clip, frames=np.roll(clip.frames, 5 * i, 1)).save(videos / f"{i}.mp4")
        (videos / f"{i}.txt").write_text("a dog runs\n")
    shutil.copytree(videos, ground / "others")
    (work / "study" / "pairs").rename(ground / "study")
    (work / "checkpoint" / "folder").rename(ground / "checkpoint")
    (work / "artwork" / "art").rename(ground / "art")
    shutil.rmtree(work)
    (ground / "prompts.txt").write_text("a dog runs\na cat jumps\n")
    os.mkfifo(ground / "pipe")
    return ground


def lay_ground(ground: Path, root: Path, case: Case) -> None:
    """A new working directory for a case: links to the ground, and the files of the case."""
    for name in ("cwd", "home", "out", "tmp"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir()
    cwd = root / "cwd"
    (cwd / "out").symlink_to(root / "out")
    for path in ground.iterdir():
        if path.name == "videos":  # where users may write to as well
            shutil.copytree(path, cwd / path.name)
        else:
            (cwd / path.name).symlink_to(path)
    shutil.copytree(ground / "study", root / "out" / "study")
    for name, data in case.files.items():
        file = cwd / name
        if not file.parent.exists():  # MODEL-bad is MODEL but for these files
            model = ground / "models" / file.parent.name.removesuffix("-bad")
            shutil.copytree(model, file.parent, copy_function=os.symlink)
        file.unlink(missing_ok=True)
        file.write_bytes(data)


def stop_before_work(ground: Path) -> None:
    """End commands where training, serving, or work in other processes would begin."""
    import uvicorn

    from cogvideo import cluster
    from cogvideo.data.tinyworld import gallery
    from cogvideo.eval import judge_training
    from cogvideo.generate import estimate
    from cogvideo.serve import server, worker
    from cogvideo.train import loop, pace, peers

    model_folder.SHIPPED = ground / "models"
    places: list[tuple[Any, str]] = [
        (uvicorn, "run"),
        (cluster, "ProcessPoolExecutor"),
        (cluster, "_on_ray"),
        (estimate.Speed, "measure"),
        (gallery, "write_held_out"),
        (judge_training, "train_world_judge"),
        (server.Crew, "__enter__"),
        (worker.Worker, "run"),
        (loop, "run_phases"),
        (pace, "_measure_phase"),
    ]
    for owner, name in places:
        setattr(owner, name, _begin)
    peers.launch = _launch(peers.launch)


def _begin(*_: object, **__: object) -> None:
    raise Begun


def _launch(launch: Callable[..., Any]) -> Callable[..., Any]:
    """`peers.launch`, for a single process."""

    def launch_one(ranks: int, work: object) -> Any:
        if ranks > 1:
            raise Begun
        return launch(ranks, work)

    return launch_one

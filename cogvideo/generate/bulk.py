"""Many videos in several processes or on a cluster: batches of prompts in, stored videos out."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cogvideo.cluster import spread
from cogvideo.generate.cogvideo import CogVideo, load
from cogvideo.generate.pipeline import Pipeline


@dataclass(frozen=True)
class Settings:
    """How all videos of a call are generated."""

    model: str
    suffix: str  # of the files, as in ".mp4"
    num_frames: int | None = None
    guidance_scale: float | None = None
    image: Path | None = None
    video: Path | None = None
    device: str = "cpu"
    dtype: str | None = None
    reference_quirks: bool = False
    adapters: tuple[tuple[str, float], ...] = ()  # where each is, and its weight


@dataclass(frozen=True)
class Batch:
    """Videos that are generated together; video i has `seed` + i."""

    settings: Settings
    prompts: tuple[str, ...]
    seed: int | None


def generate_batch(batch: Batch) -> list[bytes]:
    """The content of a file for each prompt."""
    settings = batch.settings
    pipe = _pipeline(settings)
    clips = pipe(
        list(batch.prompts),
        image=settings.image,
        video=settings.video,
        num_frames=settings.num_frames,
        guidance_scale=settings.guidance_scale,
        seed=batch.seed,
        progress=False,
    )
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for clip in clips:
            path = Path(folder) / f"clip{settings.suffix}"
            clip.save(path)
            files.append(path.read_bytes())
    return files


@lru_cache(1)
def _pipeline(settings: Settings) -> Pipeline:
    """The model of a process, loaded once."""
    pipe = load(settings.model, settings.device, settings.dtype, settings.reference_quirks)
    return with_adapters(pipe, settings.adapters)


def with_adapters(pipe: Pipeline, adapters: Sequence[tuple[str, float]]) -> Pipeline:
    """Load adapters into a model. ValueError if it is of another family, or if one does not fit."""
    if not adapters:
        return pipe
    if not isinstance(pipe, CogVideo):
        raise ValueError("adapters are for models of the family cogvideo")
    weights = {}
    for number, (where, weight) in enumerate(adapters):
        name = pipe.load_lora_weights(where, f"{number} {where}")
        weights[name] = weight
    pipe.set_adapters([*weights], [*weights.values()])
    return pipe


def generate_all(
    batches: Sequence[Batch], workers: int = 0, address: str | None = None
) -> Iterator[list[bytes]]:
    """The files of each batch, in order; the same wherever they are computed (`cluster.spread`)."""
    return spread(generate_batch, batches, workers, address)

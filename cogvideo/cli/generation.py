"""cogvideo generate: prompts in, files of videos out."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cogvideo.cli.parsing import Positional, Short

if TYPE_CHECKING:
    from cogvideo.generate.bulk import Settings
    from cogvideo.generate.pipeline import Pipeline
    from cogvideo.generate.torchrun import Slices

BATCH = 16  # videos per batch, saved before the next


def generate(
    prompt: Positional[str | None] = None,
    /,
    out: Short = Path("out.mp4"),
    model: str = "tiny",
    prompts: Path | None = None,
    num_videos: int = 1,
    num_frames: int | None = None,
    seed: int | None = None,
    guidance_scale: float | None = None,
    image: Path | None = None,
    video: Path | None = None,
    lora: tuple[str, ...] = (),
    device: str = "cpu",
    threads: int | None = None,
    dtype: Literal["float32", "bfloat16", "int8"] | None = None,
    reference_quirks: bool = False,
    ignore_memory: bool = False,
    keep: Path | None = None,
    workers: int = 0,
    ray: str | None = None,
    slices: int = 1,
    quiet: bool = False,
) -> None:
    """Generate videos from a sentence.

    Started by torchrun, each process generates some of the videos.

    Args:
        prompt: A sentence about the video, in English or Chinese.
        out: Where to write: .mp4, .gif, .webp or .png. Several videos get numbers: out-0.mp4, out-1.mp4.
        model: A shipped model, a model folder, or a hub id.
        prompts: A text file with a prompt on each line, instead of one prompt.
        num_videos: Videos for each prompt.
        num_frames: Frames of a video: fewer frames take fewer rounds of interpolation; 1 is an image, by the
            text-to-image model alone.
        seed: The same seed gives the same video. Default: a random one, which is printed. A deterministic
            model accepts it and ignores it.
        guidance_scale: Strength of classifier-free guidance, 1 (none) or more. Default: the model's own.
        image: An image that the video starts with.
        video: A video to continue.
        lora: Adapters that cogvideo train --lora made: files, their folders or hub ids, each with a weight if
            it is not 1, as in runs/mine/lora:0.8.
        device: Where to compute: cpu, cuda, mps.
        threads: CPU threads. Default: as many as there are idle cores.
        dtype: Data type of the computation. Default: the fastest on the device.
        reference_quirks: Reproduce where the original's inference differs from its training.
        ignore_memory: Run even if the model does not seem to fit into memory.
        keep: A folder for the tokens after every step; rerun with the same seed to resume an interrupted run.
        workers: Processes that generate batches of 16 videos each. Default: this one.
        ray: The address of a Ray cluster that generates, or local; its machines must see the model.
        slices: Processes of torchrun that share every matrix of the model, and so its memory.
        quiet: Print nothing but errors.
    """
    from cogvideo.generate.bulk import Settings, with_adapters
    from cogvideo.generate.torchrun import join
    from cogvideo.limits import MOST_VIDEOS, check_range, check_threads, check_workers
    from cogvideo.video import check_folder

    check_workers(workers)
    check_threads(threads)
    lines = _read_prompts(prompt, prompts)
    check_range("--num-videos", num_videos, 1, MOST_VIDEOS // len(lines))
    asked = [line for line in lines for _ in range(num_videos)]
    paths = _output_files(out, len(asked))
    if keep is not None:
        check_folder(keep)
    elsewhere = workers > 1 or ray is not None
    if elsewhere and (keep is not None or not out.suffix):
        raise ValueError("--workers and --ray write whole files; leave out --keep, and give --out a file")

    if slices > 1 and keep is not None:
        raise ValueError("--slices compute in step and cannot resume alone; leave out --keep")
    place, device = join(device, slices)
    if place.count > 1 and seed is None:
        raise ValueError("several processes need --seed: each must know the numbers of all videos")
    pipe = _open_pipeline(model, device, dtype, reference_quirks, threads, place.slices)
    adapters = _read_adapters(lora)
    with_adapters(pipe, adapters)
    pipe.check_supported(keep=keep, num_videos_per_prompt=num_videos)
    _check_memory(pipe, model, len(asked), ignore_memory)
    _check_prompts(pipe, lines, prompts, quiet)
    seeds = pipe.new_seeds(seed, len(asked))
    if keep is not None and seed is None:
        raise ValueError("--keep needs --seed, for the same command must ask for the same videos")

    if elsewhere:
        settings = Settings(
            model=model,
            suffix=out.suffix,
            num_frames=num_frames,
            guidance_scale=guidance_scale,
            image=image,
            video=video,
            device=device,
            dtype=dtype,
            reference_quirks=reference_quirks,
            adapters=adapters,
        )
        _generate_elsewhere(settings, asked, seeds, paths, workers, ray, quiet)
        return

    batch = min(BATCH, -(-len(asked) // place.count))
    for first in range(place.number * batch, len(asked), place.count * batch):
        clips = pipe(
            asked[first : first + batch],
            image=image,
            video=video,
            num_frames=num_frames,
            guidance_scale=guidance_scale,
            seed=None if seeds is None else seeds[first],
            progress=not quiet and place.number == 0 and place.writes,
            keep=keep,
        )
        if not place.writes:
            continue
        for i, clip in enumerate(clips, first):
            clip.save(paths[i])
            if not quiet:
                frames, height, width, _ = clip.frames.shape
                used = "" if seeds is None else f", seed {seeds[i]}"
                print(f"{paths[i]}  {frames} frames, {width}x{height}, {clip.fps:g} fps{used}")


def _generate_elsewhere(
    settings: "Settings",
    prompts: list[str],
    seeds: list[int] | None,
    paths: list[Path],
    workers: int,
    ray: str | None,
    quiet: bool,
) -> None:
    """Generate in several processes or on a cluster; each file is written when its batch has come."""
    from cogvideo.files import atomic_path
    from cogvideo.generate.bulk import Batch, generate_all
    from cogvideo.progress import open_progress

    each = max(1, min(BATCH, -(-len(prompts) // max(1, workers))))
    batches = []
    for first in range(0, len(prompts), each):
        seed = None if seeds is None else seeds[first]
        batches.append(Batch(settings, tuple(prompts[first : first + each]), seed))
    done = 0
    with open_progress(not quiet) as report:
        for files in generate_all(batches, workers, ray):
            for content in files:
                with atomic_path(paths[done]) as part:
                    part.write_bytes(content)
                done += 1
            if report is not None:
                report("videos", done, len(prompts))
    if not quiet:
        used = "" if seeds is None else f", seeds {seeds[0]} to {seeds[-1]}"
        print(f"{paths[0]} to {paths[-1]}{used}")


def _output_files(out: Path, count: int) -> list[Path]:
    """The file of each video; ValueError or OSError if one cannot be written."""
    from cogvideo.video import check_output

    paths = [out]
    if count > 1:
        paths = [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(count)]
    for path in paths:
        check_output(path)
    return paths


def _open_pipeline(
    model: str,
    device: str,
    dtype: str | None,
    reference_quirks: bool,
    threads: int | None,
    slices: "Slices | None" = None,
) -> "Pipeline":
    """The model, on as many threads as there are idle cores."""
    import torch

    from cogvideo.generate.cogvideo import load
    from cogvideo.hardware import idle_cores

    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or min(torch.get_num_threads(), idle_cores()))
    return load(model, device, dtype, reference_quirks, slices=slices)


def _read_adapters(asked: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """Adapters and their weights, each given as WHERE or WHERE:WEIGHT."""
    adapters = []
    for text in asked:
        where, _, weight = text.rpartition(":")
        if not where or not re.fullmatch(r"-?\d*\.?\d+", weight):
            where, weight = text, "1"
        adapters.append((where, float(weight)))
    return tuple(adapters)


def _check_memory(pipe: "Pipeline", model: str, count: int, ignore_memory: bool) -> None:
    estimate = pipe.estimate(count)
    if not estimate.fits and not ignore_memory:
        print(estimate.table(), file=sys.stderr)
        raise ValueError(f"{model} needs more memory than there is; --ignore-memory tries nevertheless")


def _check_prompts(pipe: "Pipeline", lines: list[str], file: Path | None, quiet: bool) -> None:
    """Raise ValueError for a prompt that cannot be used, by its number; print hints."""
    for number, line in enumerate(lines, 1):
        try:
            pipe.check_prompt(line)
        except ValueError as error:
            raise ValueError(f"{file}, prompt {number}: {error}" if file else error) from None
    if not quiet:
        for hint in pipe.hints(lines):
            print(f"hint: {hint}", file=sys.stderr)


def _read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The one prompt, or those of a file, one on each line."""
    from cogvideo.files import read_text

    if (prompt is None) == (file is None):
        raise ValueError("give either a prompt or --prompts FILE")
    if file is None:
        return [prompt or ""]
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file} holds no prompt; write one on each line")
    return lines

"""cogvideo data check, tokenize and world: what a model is trained on."""

import os
from functools import partial
from pathlib import Path
from typing import Literal

from cogvideo.cli.parsing import Positional, Short


def data_check(
    where: Positional[str],
    /,
    out: Short = Path("check"),
    recipe: str = "tiny",
    init: str | None = None,
    phases: tuple[str, ...] = (),
    subset: Literal["training", "validation"] | None = None,
    quiet: bool = False,
) -> None:
    """Say what a training would read: videos used and not, frame rates, sizes, captions, unknown words.

    Writes check.json, with a row for each video, and sheet.png: clips as training sees them.

    Args:
        where: What cogvideo train takes as --data: a folder of captioned videos, a table, shards.
        out: The folder for check.json and sheet.png.
        recipe: The recipe that would be trained.
        init: The model that training would start from; it tells which words are unknown.
        phases: Only these phases of the recipe. Default: all.
        subset: Of YouCook2. Default: training.
        quiet: Print nothing but errors.
    """
    from cogvideo.data.sources import open_source
    from cogvideo.data.survey import Words, sheet, survey
    from cogvideo.data.videos import Videos
    from cogvideo.generate.prompts import Prompts
    from cogvideo.layout import SECONDS
    from cogvideo.model import presets
    from cogvideo.model.folder import ModelFolder, find_model
    from cogvideo.progress import open_progress
    from cogvideo.train import recipes
    from cogvideo.video import check_folder

    chosen = recipes.find(recipe)
    check_folder(out)
    source = open_source(where, subset=subset)
    if not isinstance(source, Videos):
        raise ValueError(f"{where} is no folder, table or shard of videos; there is nothing to check")
    rows = chosen.some(phases)
    longest = presets.find(chosen.preset).text_config.text_len
    words = Words(lambda caption: len(caption.split()), longest, lambda caption: [])
    if init is not None:
        folder = ModelFolder(find_model(init))
        text = folder.text()
        prompts = Prompts(text, folder.config.words)
        words = Words(
            lambda caption: len(text.prompt(caption, SECONDS)),
            folder.spec().text_config.text_len,
            lambda caption: [*prompts.unknown_words(caption)],
        )
    with open_progress(not quiet) as report:
        found = survey(source, {phase.name: phase.clips for phase in rows}, words, report)
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / "check.json")
    sheet(source, found).save(out / "sheet.png")
    if not quiet:
        print(found.text())
        print(out / "sheet.png")


def data_tokenize(
    where: Positional[str],
    /,
    out: Short,
    model: str = "tiny",
    subset: Literal["training", "validation"] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    workers: int = 0,
    ray: str | None = None,
    quiet: bool = False,
) -> None:
    """Encode captioned videos once, into webdataset shards of codes that cogvideo train takes as --data.

    An interrupted call resumes when it is repeated; each video is encoded once.

    Args:
        where: What cogvideo train takes as --data: a folder of captioned videos, a table, shards.
        out: The folder for the shards.
        model: The model whose tokenizer encodes, and that training will start from.
        subset: Of YouCook2. Default: training.
        device: Where to compute: cpu, cuda, mps.
        threads: CPU threads. Default: as many as there are idle cores.
        workers: Processes that encode a shard of 64 videos each. Default: this one.
        ray: The address of a Ray cluster that encodes, or local; its machines must see the videos.
        quiet: Print nothing but errors.
    """
    import torch

    from cogvideo.data.coded import digest, encode_frames, write_shards
    from cogvideo.data.sources import open_source
    from cogvideo.data.videos import Videos
    from cogvideo.hardware import find_device, threads_of_each
    from cogvideo.limits import check_threads, check_workers
    from cogvideo.model.folder import ModelFolder, find_model
    from cogvideo.model.vqvae import VQVAE
    from cogvideo.progress import open_progress
    from cogvideo.video import check_folder

    check_workers(workers)
    check_threads(threads)
    source = open_source(where, subset=subset)
    if not isinstance(source, Videos):
        raise ValueError(f"{where} is no folder, table or shard of videos; there is nothing to encode")
    folder = ModelFolder(find_model(model))
    check_folder(out)
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or threads_of_each(1))
    vqvae = folder.load_as(VQVAE, "vqvae", find_device(device))
    size = folder.spec().resolution
    with open_progress(not quiet) as report:
        encode = partial(encode_frames, vqvae)
        table = write_shards(source, encode, digest(vqvae), size, out, report, workers, ray)
    if not quiet:
        print(f"{table.videos} videos in {out}, {len(table.skipped)} left out")
        for name, why in [*table.skipped.items()][:10]:
            print(f"  {name}: {why}")


def data_world(
    art: Positional[Path],
    /,
    out: Short,
    held_out: int = 256,
    judge_steps: int = 400,
    quiet: bool = False,
) -> None:
    """Make a world to train on from pictures with transparency. docs/own-world.md explains it.

    Writes the world, sheet.png to look at, clips and captions that training leaves out, and a judge of this
    world's clips. An interrupted call resumes when it is repeated.

    Args:
        art: A folder of pictures or animations (png, gif, webp, apng), with backgrounds/ and world.toml if
            there are any.
        out: The folder to write; cogvideo train takes it as --data.
        held_out: Clips to judge a model by.
        judge_steps: Steps of the judge's training, of about a second on one core; 0 for no judge.
        quiet: Print nothing but errors.
    """
    from cogvideo.data.tinyworld.artwork import make_world
    from cogvideo.data.tinyworld.gallery import sheet, write_held_out
    from cogvideo.data.tinyworld.own import JUDGE, open_world
    from cogvideo.files import atomic_path, only_writer
    from cogvideo.limits import check_range
    from cogvideo.progress import open_progress
    from cogvideo.video import check_folder

    check_range("--held-out", held_out, 0, 100_000)
    check_range("--judge-steps", judge_steps, 0, 100_000)
    check_folder(out)
    with only_writer(out):
        made = make_world(art, out)
    with only_writer(out):  # it is a new folder now
        world = open_world(out)
        with atomic_path(out / "sheet.png") as part:
            sheet(world).save(part)
        if not quiet:
            print(made.text())
            print(out / "sheet.png", flush=True)
        with open_progress(not quiet) as report:
            if held_out:
                write_held_out(world, held_out, report)
        if judge_steps and not (out / JUDGE).exists():
            accuracy = _train_judge(out, judge_steps, quiet)
            if not quiet:
                print(f"judge, on held-out clips: {accuracy}")


def _train_judge(world: Path, steps: int, quiet: bool) -> str:
    """Train a world's judge and store it; return how often it is right."""
    from cogvideo.eval import judge_training
    from cogvideo.eval.tinyworld import Classes
    from cogvideo.progress import open_progress

    classes = Classes.of(world)
    with open_progress(not quiet) as progress:
        net = judge_training.train_world_judge(classes, steps, progress)
    right = judge_training.test(net, classes, count=256, held_out=True)
    judge_training.save_judge(net, world)
    parts = {"sprite": right.sprite, "motion": right.motion, "place": right.place, "all": right.all_three}
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in parts.items())

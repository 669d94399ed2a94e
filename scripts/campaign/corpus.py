"""Good files of every kind that users bring, and how the package reads them.

A kind has some examples, a folder of files each. What a reader returns is not looked at: only how it fails.
"""

import io
import itertools
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cogvideo.cli.generation import _read_prompts
from cogvideo.convert.cogvideo import convert_sat
from cogvideo.convert.icetk import convert_icetk
from cogvideo.convert.sat import read_states
from cogvideo.data import coded
from cogvideo.data.sources import open_source
from cogvideo.data.tinyworld.artwork import make_world
from cogvideo.eval.clips import find_items
from cogvideo.eval.protocol import Protocol
from cogvideo.eval.study import Ballot, Key, Plan, create
from cogvideo.eval.study_report import tally
from cogvideo.serve.decoding import decode
from cogvideo.video import Clip, VideoFile, read_image
from scripts.campaign import requests

TESTS = Path(__file__).parents[2] / "tests"
_numbers = itertools.count()
TIMES = (0.0, 0.5, 1.0)  # seconds, of frames that are read
TOML = """languages = ["en", "zh"]
places = ["desert", "snow"]
[sprites.ball]
name = "red ball"
zh = "红球"
synonyms = ["sphere"]
kind = "thing"
lives = ["ground"]
facing = "front"
moves = ["slide"]
[backgrounds.kitchen]
said = ["in the kitchen"]
zh = "厨房"
"""


@dataclass(frozen=True)
class Kind:
    """Files of one kind."""

    write: Callable[[Path], None]  # the examples, as folders below a folder
    read: Callable[[Path, Path], None]  # a folder, and where output may go
    harmed: tuple[str, ...] = ("*",)  # patterns of the files that are damaged
    named: bool = True  # whether errors name one of its files


def _clip(frames: int = 17, side: int = 32) -> Clip:
    levels = np.arange(frames * side * side * 3).reshape(frames, side, side, 3) // 7 % 256
    return Clip(levels.astype(np.uint8), 8, "a dog runs")


def _film(file: Path) -> Path:
    """A video in the container that the extension names."""
    import av

    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in (".mp4", ".gif", ".webp"):
        _clip().save(file)
        return file
    codec = {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(file.suffix, "libx264")
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for frame in _clip().frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file


def _only(folder: Path, *patterns: str) -> Path:
    """The only file of a folder, of some patterns."""
    found = [file for pattern in patterns or ("*",) for file in sorted(folder.glob(pattern))]
    return found[0] if found else folder / (patterns or ("nothing",))[0]


# -- pictures and videos


def _write_images(folder: Path) -> None:
    image = Image.fromarray(_clip().frames[3])
    for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tif"):
        (folder / name).mkdir()
        image.save(folder / name / name)
    for name, mode in (("p.png", "P"), ("i.png", "I;16"), ("rgba.png", "RGBA")):
        (folder / name).mkdir()
        image.convert("L" if mode[0] == "I" else mode).convert(mode).save(folder / name / name)


def _read_image(folder: Path, out: Path) -> None:
    read_image(_only(folder), 16)


def _write_videos(folder: Path) -> None:
    for name in ("a.mp4", "a.webm", "a.mkv", "a.mov", "a.avi", "a.gif"):
        _film(folder / name / name)


def _read_video(folder: Path, out: Path) -> None:
    video = VideoFile.open(_only(folder))
    video.frames([time for time in TIMES if time <= video.seconds], 16)
    Clip.load(_only(folder))


def _write_animations(folder: Path) -> None:
    for name in ("a.gif", "a.webp"):
        _film(folder / name / name)
    (folder / "frames").mkdir()
    _clip(3).save(folder / "frames" / "a")


def _read_animation(folder: Path, out: Path) -> None:
    file = _only(folder)
    Clip.load(file)


def _read_upload(folder: Path, out: Path) -> None:
    file = _only(folder)
    if file.is_file() and not file.is_symlink():
        decode(file.read_bytes(), 16, 1.0, 5)


def _write_uploads(folder: Path) -> None:
    _write_images(folder)
    _write_videos(folder)


# -- captioned videos


def _write_tables(folder: Path) -> None:
    for name in ("captions.csv", "metadata.jsonl"):
        _film(folder / name / "a.mp4")
        _film(folder / name / "b.gif")
    rows = [("a.mp4", "a dog", "0", "1.5"), ("a.mp4", "a cat", "0.5", "2"), ("b.gif", "a cow", "", "")]
    lines = ["file_name,text,start,end", *map(",".join, rows)]
    (folder / "captions.csv" / "captions.csv").write_text("\n".join(lines))
    lines = []
    for name, text, start, end in rows:
        times = {"start": float(start), "end": float(end)} if start else {}
        lines.append(json.dumps({"file_name": name, "text": [text], **times}))
    (folder / "metadata.jsonl" / "metadata.jsonl").write_text("\n".join(lines))
    _film(folder / "texts" / "a.mp4")
    (folder / "texts" / "a.txt").write_text("a dog\na brown dog\n")


def _read_videos(folder: Path, out: Path) -> None:
    """All that a training would read first."""
    source = open_source(folder)
    assert source.count is not None
    rng = np.random.default_rng(0)
    for index in range(min(3, source.count)):
        source.caption(index, rng)
        video = source[index]
        video.frames([time for time in TIMES if time <= video.seconds], 16)


def _write_annotations(folder: Path) -> None:
    steps = [
        {"segment": [0, 1], "sentence": "cut", "id": 0},
        {"segment": [1, 2], "sentence": "stir", "id": 1},
    ]
    video = {"subset": "training", "annotations": steps, "duration": 2.0}
    database = {"a": video, "b": {**video, "subset": "validation"}}
    _film(folder / "youcook" / "a.mp4")
    text = json.dumps({"database": database})
    (folder / "youcook" / "youcookii_annotations_trainval.json").write_text(text)


def _write_shards(folder: Path) -> None:
    film = _film(folder / "shards" / "a.mp4")
    members = {
        "a.mp4": film.read_bytes(),
        "a.txt": b"a dog\n",
        "b.mp4": film.read_bytes(),
        "b.json": b'{"text": "b"}',
    }
    film.unlink()
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        (folder / f"shard{number}").mkdir()
        with tarfile.open(folder / f"shard{number}" / "a.tar", "w", format=form) as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    shutil.rmtree(folder / "shards")


def _write_coded(folder: Path) -> None:
    _write_tables(folder / "made")
    source = open_source(folder / "made" / "captions.csv")
    assert hasattr(source, "entries")
    coded.write_shards(
        source, lambda frames: np.zeros((len(frames), 4), np.uint16), "x", 16, folder / "coded"
    )
    shutil.rmtree(folder / "made")


def _read_coded(folder: Path, out: Path) -> None:
    source = coded.open_coded(folder)
    for index in range(source.count):
        source[index].codes([0.0])


def _write_lists(folder: Path) -> None:
    (folder / "list").mkdir()
    _film(folder / "list" / "a.mp4")
    (folder / "list" / "paths.txt").write_text("a.mp4\n\na.mp4\n")


def _read_list(folder: Path, out: Path) -> None:
    for item in find_items(folder / "paths.txt"):
        item.frames(Protocol(frames=3, fps=2, size=16))


def _write_prompts(folder: Path) -> None:
    (folder / "prompts").mkdir()
    (folder / "prompts" / "prompts.txt").write_text("a dog runs\n一只猫\n", encoding="utf-8")


def _read_prompts_file(folder: Path, out: Path) -> None:
    _read_prompts(None, folder / "prompts.txt")


# -- worlds


def _write_artwork(folder: Path) -> None:
    art = folder / "art"
    (art / "backgrounds").mkdir(parents=True)
    picture = Image.new("RGBA", (40, 40))
    picture.paste("red", (8, 8, 32, 32))
    picture.save(art / "ball.png")
    picture.save(art / "dance.gif", save_all=True, append_images=[picture.rotate(45)], duration=80)
    picture.save(art / "wave.webp", save_all=True, append_images=[picture.rotate(45)], duration=80)
    Image.new("RGB", (120, 100), "green").save(art / "backgrounds" / "kitchen.jpg")
    (art / "world.toml").write_text(TOML, encoding="utf-8")


def _read_artwork(folder: Path, out: Path) -> None:
    world = out / f"made-{next(_numbers)}"
    make_world(folder, world)
    _read_world(world, out)


def _write_worlds(folder: Path) -> None:
    _write_artwork(folder)
    make_world(folder / "art", folder / "world")
    shutil.rmtree(folder / "art")


def _read_world(folder: Path, out: Path) -> None:
    world = out / f"world-{next(_numbers)}"  # a name of its own, as worlds are cached by their names
    world.symlink_to(folder)
    source = open_source(world)
    rng = np.random.default_rng(0)
    for index in range(4):
        source.caption(index, rng)
        source[index].frames(TIMES, 16)


# -- checkpoints


def _tests() -> Any:
    """The makers of small checkpoints, which the tests have."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    import test_convert

    return test_convert


def _write_states(folder: Path) -> None:
    state = {"module": {"a.weight": torch.ones(3, 4), "a.bias": torch.zeros(4).half()}, "iteration": 7}
    for name, zipped in (("new", True), ("old", False)):
        (folder / name).mkdir()
        torch.save(state, folder / name / "a.pt", _use_new_zipfile_serialization=zipped)


def _read_states(folder: Path, out: Path) -> None:
    for value in read_states(folder / "a.pt").values():
        value.float().sum()


def _write_checkpoints(folder: Path) -> None:
    _tests().small(folder, "folder")
    (folder / "zip").mkdir()
    file = _tests().zipped(folder / "folder")
    file.rename(folder / "zip" / "a.zip")


def _read_checkpoint(folder: Path, out: Path) -> None:
    archive = folder / "a.zip"
    source = archive if archive.exists() else folder
    convert_sat([source], out / "model", 20, lambda line: None)


def _write_icetk(folder: Path) -> None:
    _tests().write_icetk(folder / "icetk")


def _read_icetk(folder: Path, out: Path) -> None:
    convert_icetk(folder, out / "model", lambda line: None)


# -- studies


def _write_studies(folder: Path) -> None:
    systems = [folder / "left", folder / "right"]
    for system in systems:
        for name in "ab":
            _film(system / f"{name}.mp4")
    for mode in ("pairs", "ratings"):
        plan = Plan(systems, mode, protocol=Protocol(frames=3, fps=2, size=32), per_rater=2, repeats=1)
        create(folder / mode, plan)
        ballot = Ballot(folder / mode)
        rater = ballot.join()
        for position in range(len(ballot.study.order(rater))):
            scores = {"texture": 3, "motion": 3, "relevance": 3, "total": 5} if mode == "ratings" else {}
            choice = "" if scores else ballot.study.shown(rater, position)[0]
            ballot.vote(rater, position, choice, scores, 2.0)
    for system in systems:
        shutil.rmtree(system)


def _read_study(folder: Path, out: Path) -> None:
    ballot = Ballot(folder)
    Key.load(folder)
    for rater in ballot.raters:
        ballot.next_position(rater)
    tally(folder, resamples=5)


def _read_request(folder: Path, out: Path) -> None:
    requests.read(folder, out, _write_studies)


KINDS = {
    "image": Kind(_write_images, _read_image),
    "video": Kind(_write_videos, _read_video),
    "animation": Kind(_write_animations, _read_animation),
    "upload": Kind(_write_uploads, _read_upload, named=False),
    "table": Kind(_write_tables, _read_videos, ("*.csv", "*.jsonl", "*.txt")),
    "annotations": Kind(_write_annotations, _read_videos, ("*.json",)),
    "shard": Kind(_write_shards, _read_videos),
    "coded": Kind(_write_coded, _read_coded),
    "list": Kind(_write_lists, _read_list, ("*.txt",)),
    "prompts": Kind(_write_prompts, _read_prompts_file),
    "artwork": Kind(
        _write_artwork, _read_artwork, ("*.png", "*.gif", "*.webp", "*.toml", "*.toml", "*/*.jpg")
    ),
    "world": Kind(_write_worlds, _read_world, ("*.json", "*.json", "*/*.png")),
    "pickle": Kind(_write_states, _read_states),
    "checkpoint": Kind(
        _write_checkpoints, _read_checkpoint, ("*.zip", "*.zip", "*.json", "latest", "*/*.pt")
    ),
    "icetk": Kind(_write_icetk, _read_icetk),
    "study": Kind(_write_studies, _read_study, ("*.json", "*.jsonl")),
    "request": Kind(requests.write, _read_request, named=False),
}

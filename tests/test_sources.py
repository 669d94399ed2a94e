"""Every door to data gives recordings with their own captions, and says what is missing by its name."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from cogvideo.data.sources import open_source
from cogvideo.data.tinyworld import TinyWorld, sprites
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
    assert source == TinyWorld(sprites(16), 3, even=True) and source.count is None
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
        with pytest.raises(ValueError, match="give tinyworld; a folder of videos .*shards") as error:
            open_source(where)
        assert str(where) in str(error.value)


def test_a_missing_caption_is_named(tmp_path, films):
    folder = folder_of(tmp_path / "data", films)
    (folder / "b.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"no caption for .*b\.mp4"):
        open_source(folder)
    (folder / "captions.csv").write_text("file_name,text\na.mp4,one\nb.mp4,two\n")
    with pytest.raises(ValueError, match=r"no caption for .*c\.mp4 in .*captions\.csv"):
        open_source(folder)
    (folder / "captions.csv").write_text("file_name,text\na.mp4,one\nb.mp4,two\nc.mp4,three\nd.mp4,four\n")
    with pytest.raises(ValueError, match=r"captions\.csv names .*d\.mp4, which is not there"):
        open_source(folder)
    with pytest.raises(ValueError, match=r"no caption for a\.mp4 in .*x\.tar.*a\.txt"):
        open_source(shard(tmp_path / "x.tar", {"a.mp4": films["a"], "b.txt": "b"}))


def test_broken_tables_and_shards_are_named(tmp_path, films):
    folder = folder_of(tmp_path / "data", films, captions=False)
    for name, text in (
        ("metadata.jsonl", b'{"file_name": "a.mp4"}'),
        ("captions.jsonl", b"{oops"),
        ("captions.csv", b"name,caption\na.mp4,one\n"),
        ("captions.jsonl", b"[1]"),
        ("metadata.csv", b"file_name,text\n\xff,a\n"),
        ("captions.jsonl", b'{"file_name": "a.mp4", "text": 5}'),
    ):
        (folder / name).write_bytes(text)
        with pytest.raises(ValueError, match=f"cannot read .*{name}: each row needs file_name and text"):
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

"""Files that are damaged, endless or made to harm end in one line that names them."""

import io
import json
import os
import re
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogvideo.convert.sat import find_checkpoints, open_checkpoint, read_states
from cogvideo.data.coded import _read_index
from cogvideo.data.sources import open_source
from cogvideo.data.tinyworld.artwork import make_world, read_settings
from cogvideo.eval.clips import find_items
from cogvideo.eval.study import Ballot, Key, load
from cogvideo.eval.study_report import tally
from cogvideo.files import parse_json, read_text
from cogvideo.generate.cogvideo import CogVideo
from cogvideo.model.folder import ModelFolder, read_clusters
from cogvideo.train import checkpoint, report
from cogvideo.video import Clip, VideoFile, read_image


def film(path: Path, frames: int = 9) -> Path:
    Clip(np.zeros((frames, 16, 16, 3), np.uint8), 8).save(path)
    return path


def fails(call, *words: str) -> None:
    """The call raises one line with these words, and warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as caught:
            call()
    for word in words:
        assert word in str(caught.value)


# -- files that never end


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.tar", "a.mp4", "a.gif", "a.png", "a.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_read(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    read = open_source
    if path.suffix in (".mp4", ".gif"):
        read = VideoFile.open
    elif path.suffix == ".png":
        read = lambda path: read_image(path, 8)  # noqa: E731
    elif path.suffix == ".txt":
        read = read_text
    fails(lambda: read(path), name)


def test_pipes_in_folders_are_passed_by(tmp_path):
    film(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "b.mp4")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.mp4").mkdir()
    assert open_source(tmp_path).count == 1
    assert len(find_items(tmp_path)) == 1


# -- tables


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("1" * 400, "400 digits"),
        ("1" * 5000, "5000 digits"),
        ("NaN", "NaN is no number"),
        ("-Infinity", "Infinity is no number"),
        (r'"\ud800"', "half of a character"),
        (b'"\xff"', "UTF-8"),
        ("", "not JSON"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_json_is_read_strictly(text, message):
    fails(lambda: parse_json(text), message)


def test_json_keeps_what_is_right():
    assert parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\udc15", "b": [1, -2.5, null]}') == {
        "a": "🐕",
        "b": [1, -2.5, None],
    }


@pytest.mark.parametrize(
    "row, message",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"file_name": "a.mp4", "text": "a", "start": ' + "9" * 400 + "}", "400 digits"),
        ('{"file_name": "a.mp4", "text": "a", "start": NaN}', "NaN is no number"),
        ('{"file_name": "a.mp4", "text": "a", "start": true}', "start must be a number of seconds"),
        ('{"file_name": "a.mp4", "text": "a", "end": [1]}', "end must be a number of seconds"),
        ('{"file_name": "a.mp4", "text": "a", "end": "soon"}', "end must be a number of seconds"),
        ('{"file_name": 5, "text": "a"}', "path or file_name must be a text"),
        (r'{"file_name": "\ud800", "text": "a"}', "half of a character"),
        ('{"file_name": "a.mp4", "text": ' + "[" * 500 + "]" * 500 + "}", "a caption is a text or a list"),
        ("5", "row 1: it must be a table"),
    ],
    ids=lambda value: value[:44],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(row)
    fails(lambda: open_source(tmp_path / "a.jsonl"), "a.jsonl", message)


@pytest.mark.parametrize("start", ["nan", "-1", "inf", "1e400", "9" * 500])
def test_impossible_times_are_skipped(tmp_path, start):
    film(tmp_path / "a.mp4")
    (tmp_path / "a.csv").write_text(f"file_name,text,start\na.mp4,a,\na.mp4,b,{start}\n")
    source = open_source(tmp_path / "a.csv")
    assert source.count == 1 and "its start must be" in next(iter(source.skipped.values()))


def test_a_name_that_no_file_can_have_is_skipped(tmp_path):
    film(tmp_path / "a.mp4")
    (tmp_path / "a.csv").write_text(f"file_name,text\na.mp4,a\n{'x' * 9999},b\n")
    assert open_source(tmp_path / "a.csv").count == 1


def test_annotations_nested_without_end_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"database": ' * 50_000)
    fails(lambda: open_source(tmp_path / "a.json"), "a.json", "nested too deeply")


# -- shards


def test_a_pattern_of_too_many_shards_is_refused_at_once():
    fails(lambda: open_source("x-{0..99999999}.tar"), "names 100000000 shards; at most 100000")
    fails(lambda: open_source("x-{0..9999}-{0..9999}.tar"), "names 100000000 shards")
    fails(lambda: open_source(f"x-{{0..{'9' * 99}}}.tar"), "cannot read the shard")


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def member(name: str, size: int = 0, **values: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in values.items():
        setattr(info, key, value)
    return info


def test_a_caption_of_a_terabyte_is_not_read(tmp_path):
    """A sparse member, which is small in the file."""
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**12)}
    data = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
    path = tar_of(tmp_path / "a.tar", (member("a.txt", len(data), pax_headers=sparse), data))
    fails(lambda: open_source(path), "a.tar", "a.txt", "1000000000000 bytes")


def test_links_of_a_shard_are_not_followed(tmp_path):
    data = film(tmp_path / "a.mp4").read_bytes()
    link = member("a.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    path = tar_of(tmp_path / "a.tar", (member("a.mp4", len(data)), data), (link, b""))
    fails(lambda: open_source(path), "a.tar", "no caption in a.txt")


@pytest.mark.parametrize("text", [b"\xff\xfe", b"[" * 99_999, b'{"caption": 5}'])
def test_a_bad_caption_in_a_shard_is_named(tmp_path, text):
    name = "a.txt" if text[0] == 0xFF else "a.json"
    path = tar_of(tmp_path / "a.tar", (member(name, len(text)), text))
    fails(lambda: open_source(path), "a.tar", name)


def test_a_size_that_no_memory_holds_is_a_damaged_header(tmp_path):
    path = tar_of(tmp_path / "a.tar", (member("a.txt", pax_headers={"comment": "x"}), b""))
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (2**62).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % sum(data[:148] + b" " * 8 + data[156:512])
    path.write_bytes(data)
    fails(lambda: open_source(path), "cannot read the shard", "a.tar")


def coded_folder(folder: Path, **stored: object) -> Path:
    """A folder as cogvideo data tokenize writes it, of one video."""
    folder.mkdir()
    codes = io.BytesIO()
    np.save(codes, np.zeros((9, 4), np.uint16))
    data = codes.getvalue()
    row = json.dumps({"name": "a", "captions": ["a dog"], "fps": 8.0} | stored).encode()
    members = [(member("0.codes.npy", len(data)), data), (member("0.json", len(row)), row)]
    tar_of(folder / "000000.tar", *members)
    table = {"tokenizer": "x", "size": 16, "videos": 1, "source": "x"}
    (folder / "tokens.json").write_text(json.dumps(table))
    return folder


def test_damaged_codes_are_named(tmp_path):
    assert open_source(coded_folder(tmp_path / "good"))[0].seconds == 1
    for number, (stored, message) in enumerate(
        (
            ({"fps": 0.0}, "fps must be from"),
            ({"captions": []}, "captions are missing"),
            ({"name": "x" * 2**21}, "too large"),
        )
    ):
        folder = coded_folder(tmp_path / str(number), **stored)
        fails(lambda folder=folder: open_source(folder), "000000.tar", message)
    folder = tmp_path / "good"
    data = (folder / "000000.tar").read_bytes()
    (folder / "000000.tar").write_bytes(data.replace(b"'shape'", b"'sh\\ape"))
    fails(lambda: open_source(folder)[0], "000000.tar")
    (folder / "tokens.json").write_text("[" * 99_999)
    fails(lambda: open_source(folder), "tokens.json", "nested too deeply")
    (folder / "000000.tar").unlink()
    os.mkfifo(folder / "000000.tar")
    fails(lambda: _read_index(folder / "000000.tar"), "000000.tar", "a device or pipe")


# -- pictures and videos


def test_a_video_that_nothing_decodes_is_named(tmp_path):
    path = film(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    fails(lambda: VideoFile.open(path), "a.mp4", "nothing here decodes it")


def test_a_title_that_is_no_text_is_no_error(tmp_path):
    path = tmp_path / "a.mp4"
    Clip(np.zeros((9, 16, 16, 3), np.uint8), 8, "a good title").save(path)
    path.write_bytes(path.read_bytes().replace(b"a good title", b"a g\xff\xfed title"))
    assert VideoFile.open(path).title.startswith("a g")


def test_a_video_of_one_frame_is_too_short_and_no_more(tmp_path):
    film(tmp_path / "a.mp4", 1)
    (tmp_path / "a.txt").write_text("a")
    assert open_source(tmp_path)[0].seconds == 0


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tif"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_half_a_picture_is_named(tmp_path, name, part):
    path = tmp_path / name
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    fails(lambda: read_image(path, 8), str(path))


def test_bombs_of_pixels_are_refused(tmp_path):
    """One that Pillow warns of, one that it refuses, and a text that it refuses."""
    for side in (10_000, 20_000):
        path = tmp_path / f"{side}.png"
        Image.new("1", (side, side)).save(path)
        fails(lambda path=path: read_image(path, 8), str(path), "more than 89478485 pixels")
        fails(lambda path=path: Clip.load(path.parent), str(path.parent), "89478485 pixels")
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("a", "x" * 2**24, zip=True)
    Image.new("1", (8, 8)).save(tmp_path / "text.png", pnginfo=text)
    fails(lambda: read_image(tmp_path / "text.png", 8), "text.png", "too large")


def test_an_animation_that_fills_the_memory_is_refused(tmp_path):
    path = tmp_path / "a.gif"
    frames = [Image.new("P", (9000, 9000), i) for i in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[20, 20, 60_000])
    fails(lambda: Clip.load(path), "a.gif", "too long for memory")


def test_bad_artwork_is_left_out_with_the_reason(tmp_path):
    art = tmp_path / "art"
    art.mkdir()
    good = Image.new("RGBA", (64, 64))
    good.paste((255, 0, 0, 255), (16, 16, 48, 48))
    good.save(art / "box.png")
    Image.new("1", (10_000, 10_000)).save(art / "bomb.png")
    (art / "half.png").write_bytes((art / "box.png").read_bytes()[:60])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = make_world(art, tmp_path / "out")
    assert made.sprites == ["box"] and sorted(made.skipped) == ["bomb.png", "half.png"]


def test_a_bad_sprite_of_a_world_is_named(tmp_path):
    art = tmp_path / "art"
    art.mkdir()
    good = Image.new("RGBA", (64, 64))
    good.paste((255, 0, 0, 255), (16, 16, 48, 48))
    good.save(art / "box.png")
    make_world(art, tmp_path / "world")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "world" / "sprites" / "box.png")
    source = open_source(tmp_path / "world")
    fails(lambda: source[0].frames([0.0], 16), "box.png", "89478485 pixels")


def test_a_name_without_end_is_shown_in_part(tmp_path):
    picture = Image.new("RGBA", (64, 64))
    picture.paste((255, 0, 0, 255), (16, 16, 48, 48))
    picture.save(tmp_path / "box.png")
    (tmp_path / "world.toml").write_text(f'[sprites.box]\nzh = "{"x" * 9999}"\n')
    fails(lambda: make_world(tmp_path, tmp_path / "out"), f"{tmp_path}: the Chinese name 'xxx", "has 9999")


def test_settings_nested_without_end_are_named(tmp_path):
    (tmp_path / "world.toml").write_text("places = " + "[" * 50_000)
    fails(lambda: read_settings(tmp_path), "world.toml", "nested too deeply")


# -- checkpoints


def test_a_checkpoint_that_is_not_there_is_said(tmp_path):
    fails(lambda: find_checkpoints([tmp_path / "none.zip"]), "there is no", "none.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_damaged_members_of_a_zip_are_named(tmp_path, method):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/latest", os.urandom(2000).hex())
    whole = path.read_bytes()
    for position in range(40, 1900, 60):
        data = bytearray(whole)
        data[position] ^= 0xFF
        path.write_bytes(data)

        def read() -> None:
            with open_checkpoint(path, tmp_path / "out"):
                pass

        fails(read, "a.zip")


def test_errors_of_a_zip_name_the_zip(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b/latest", "x")

    def read() -> None:
        with open_checkpoint(path, tmp_path / "out"):
            pass

    fails(read, f"{path}: b/latest says 'x'")


def test_pickles_of_another_protocol_are_refused_without_a_warning(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"\x80\x04K\x01.")
    fails(lambda: read_states(path), "a.pt")
    path.unlink()
    os.mkfifo(path)
    fails(lambda: read_states(path), "a.pt", "a device or pipe")


def test_clusters_with_half_a_header_are_named(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(4, int))
    path.write_bytes(path.read_bytes().replace(b"(4,), }", b"(4,    "))
    fails(lambda: read_clusters(path, 4), "a.npy")


def test_endless_files_of_a_checkpoint_are_named(tmp_path):
    (tmp_path / "latest").symlink_to("/dev/zero")

    def read() -> None:
        with open_checkpoint(tmp_path, tmp_path / "out"):
            pass

    fails(read, "latest", "a device or pipe")
    (tmp_path / "model_config.json").write_text("[" * 99_999)
    fails(read, "model_config.json", "nested too deeply")


# -- studies

STUDY = {
    "mode": "pairs",
    "seed": 0,
    "per_rater": 1,
    "repeats": 0,
    "rules": {},
    "trials": [{"number": 0, "kind": "normal", "prompt": "a", "clips": ["0" * 16, "1" * 16]}],
}
VOTE = {
    "rater": "a" * 32,
    "position": 0,
    "trial": 0,
    "again": False,
    "shown": ["1" * 16, "0" * 16],
    "choice": "",
    "scores": {},
    "seconds": 1.5,
    "at": 1.0,
}


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("study.json", "[" * 99_999, "nested too deeply"),
        ("study.json", "[]", "must be a table"),
        ("study.json", json.dumps(STUDY | {"seed": "x"}), "seed must be a whole number"),
        ("study.json", json.dumps(STUDY | {"mode": "x"}), "mode must be one of pairs"),
        ("study.json", json.dumps(STUDY | {"trials": [{}]}), "trials.0.number is missing"),
        (
            "study.json",
            json.dumps(STUDY | {"trials": [STUDY["trials"][0] | {"clips": ["../../etc"]}]}),
            "not the names of clips",
        ),
        ("votes.jsonl", "5", "line 1: the file must be a table"),
        ("votes.jsonl", json.dumps(VOTE | {"trial": 7}), "a vote of another study"),
        ("votes.jsonl", json.dumps(VOTE | {"choice": "x"}), "a vote of another study"),
        ("votes.jsonl", json.dumps(VOTE | {"shown": 5}), "shown must be a list"),
        ("raters.jsonl", '{"rater": 5}', "rater must be a string"),
        ("key.json", "{}", "systems is missing"),
        ("key.json", '{"systems": [], "real": null, "clips": {"a": 5}}', "clips.a must be a list"),
    ],
    ids=lambda value: value[:24],
)
def test_a_damaged_study_is_named(tmp_path, file, text, message):
    (tmp_path / "study.json").write_text(json.dumps(STUDY))
    (tmp_path / "votes.jsonl").write_text(json.dumps(VOTE) + "\n" + json.dumps(VOTE)[:50])
    assert load(tmp_path).trials[0].prompt == "a" and len(Ballot(tmp_path).votes) == 1
    (tmp_path / file).write_text(text)
    read = {"study.json": load, "key.json": Key.load}.get(file, Ballot)
    fails(lambda: read(tmp_path), file, message)


def test_a_key_of_another_study_is_named(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(STUDY))
    (tmp_path / "votes.jsonl").write_text(json.dumps(VOTE))
    (tmp_path / "key.json").write_text('{"systems": ["left"], "real": null, "clips": {}}')
    fails(lambda: tally(tmp_path), "key.json", "which of left made the clip 0000000000000000")


# -- what an interrupted call resumes from


def negative(stored: dict) -> None:
    stored["codes"][0, 0, 0] = -1


def too_large(stored: dict) -> None:
    stored["codes"][0, -1, -1] = 64


def one_frame_less(stored: dict) -> None:
    stored["codes"] = stored["codes"][:, :-1]


def fewer_tokens(stored: dict) -> None:
    stored["codes"] = stored["codes"][:, :, :-1]


def another_prompt(stored: dict) -> None:
    stored["prompts"] = np.array(["a cat"])


def another_type(stored: dict) -> None:
    stored["codes"] = stored["codes"].astype(np.float32)


def no_codes(stored: dict) -> None:
    del stored["codes"]


@pytest.mark.parametrize(
    "change, reason",
    [
        (negative, "its tokens must be from 0 to 63"),
        (too_large, "its tokens must be from 0 to 63"),
        (one_frame_less, "is not of this call; delete it"),
        (fewer_tokens, "is not of this call; delete it"),
        (another_prompt, "is not of this call; delete it"),
        (another_type, "holds no tokens of clips"),
        (no_codes, "holds no tokens of clips"),
    ],
)
def test_a_damaged_draft_is_refused(nano, tmp_path, change, reason):
    pipe = CogVideo(ModelFolder(nano))
    call = {"num_frames": 5, "seed": 1, "keep": tmp_path, "progress": False}
    (clip,) = pipe("a dog", **call)
    file = next(tmp_path.glob("*-frames.npz"))
    stored = dict(np.load(file))
    (again,) = pipe("a dog", **call)
    assert np.array_equal(clip.frames, again.frames)
    change(stored)
    np.savez(file, **stored)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{reason}"):
        pipe("a dog", **call)


def test_half_a_draft_is_refused(nano, tmp_path):
    pipe = CogVideo(ModelFolder(nano))
    call = {"num_frames": 5, "seed": 1, "keep": tmp_path, "progress": False}
    pipe("a dog", **call)
    file = next(tmp_path.glob("*-frames.npz"))
    whole = file.read_bytes()
    for end in range(0, len(whole), 97):
        file.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"-frames\.npz"):
            pipe("a dog", **call)


@pytest.mark.parametrize(
    "state",
    [
        [],
        {"step": 1},
        {"step": "1", "tensors": {}},
        {"step": -1, "tensors": {}},
        {"step": 1, "tensors": [1]},
        {"step": 1, "tensors": {"a": 1}},
        {"step": 1, "parts": {}, "optimizers": 3},
    ],
)
def test_a_state_of_something_else_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt is damaged \(.*delete it to begin this phase again"):
        checkpoint.read(tmp_path / "state.pt")


def test_half_a_state_is_refused(tmp_path):
    file = tmp_path / "state.pt"
    torch.save({"step": 1, "tensors": {"a": torch.ones(50)}}, file)
    whole = file.read_bytes()
    assert torch.equal(checkpoint.read(file)["a"], torch.ones(50))
    for end in range(0, len(whole), 53):
        file.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"state\.pt is damaged"):
            checkpoint.read(file)


def test_a_damaged_log_loses_its_damaged_rows_alone(tmp_path):
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    bad = ['{"step": 4, "lo', "[1]", '{"loss": 2}', "\udcff\udcfe", "NaN", '{"step": "5"}', "[" * 100_000]
    text = "\n".join([rows[0], *bad[:4], rows[1], *bad[4:], rows[2]])
    (tmp_path / "log.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    assert [row["step"] for row in report.read_log(tmp_path / "log.jsonl")] == [1, 2, 3]
    report.Report(tmp_path, "image", 4, 1, 1, quiet=True).forget(2)
    assert (tmp_path / "log.jsonl").read_text() == f"{rows[0]}\n{rows[1]}\n"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a.mp4": 1}', "\x00"])
def test_a_damaged_list_of_skipped_videos_is_refused(tmp_path, text):
    (tmp_path / "skipped.json").write_text(text)
    with pytest.raises(ValueError, match=r"skipped\.json"):
        report.Report(tmp_path, "image", 4, 1, 1, quiet=True)

"""`cogvideo data check`: what a training would read of a user's own videos."""

import json
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from cogvideo import cli
from cogvideo.data.cut import ClipSpec
from cogvideo.data.sources import open_source
from cogvideo.data.survey import Words, survey
from cogvideo.video import Clip

WORDS = Words(
    lambda caption: len(caption.split()), 4, lambda caption: [w for w in caption.split() if w == "zyx"]
)
PHASES = {"stage1": ClipSpec(5, (1, 2)), "stage2": ClipSpec(5, (8,))}


def video(path, frames=33, fps=8.0, caption="a dog runs", height=24, width=32):
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, (frames, height, width, 3), np.uint8)
    Clip(pixels, fps).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def folder(tmp_path):
    """What people have: portrait, short, silent, broken, without words, of two rates."""
    video(tmp_path / "a.mp4")
    video(tmp_path / "b.mp4", height=64, width=36, caption="a zyx dog runs to the right\na dog")
    video(tmp_path / "fast.mp4", frames=61, fps=30.0)  # 2 s
    video(tmp_path / "short.mp4", frames=3)
    video(tmp_path / "silent.mp4", caption=None)
    video(tmp_path / "empty.mp4", caption=" ")
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:200])
    (tmp_path / "broken.txt").write_text("a dog")
    return tmp_path


def test_every_video_is_used_or_named_with_the_reason(folder):
    found = survey(open_source(folder), PHASES, WORDS)
    rows = {row.name.rpartition("/")[2]: row for row in found.rows}
    assert len(rows) == 7
    assert {name for name, row in rows.items() if row.used} == {"a.mp4", "b.mp4", "fast.mp4"}
    assert "no caption" in rows["silent.mp4"].why and "no caption" in rows["empty.mp4"].why
    assert "too few" in rows["short.mp4"].why and rows["broken.mp4"].why
    assert rows["fast.mp4"].phases == ["stage1", "stage2"] and rows["a.mp4"].why == ""
    portrait = rows["b.mp4"]
    assert (portrait.width, portrait.height, portrait.fps, portrait.seconds) == (36, 64, 8.0, 4.0)
    assert (portrait.captions, portrait.tokens, portrait.cut, portrait.unknown) == (2, 7, 1, ["zyx"])
    text = found.text()
    assert "3 videos are used, 4 are not" in text and "zyx (1)" in text
    assert "1 are longer than the 4 tokens" in text and "stage2    3 videos have 5 frames at 8 fps" in text


def test_what_is_said_to_be_used_is_what_training_reads(folder):
    """The loader skips the same videos."""
    from cogvideo.data.loader import ClipDataset

    source = open_source(folder)
    found = survey(source, {"stage1": PHASES["stage1"]}, WORDS)
    dataset = ClipDataset(source, PHASES["stage1"], seed=0)
    read = set()
    skipped = {}
    for number in range(20):
        loaded = dataset[number]
        read.add(source.name(loaded.video_index))
        skipped |= loaded.skipped
    assert read == {row.name for row in found.used}
    assert skipped.keys() == {row.name for row in found.rows if not row.used} - source.skipped.keys()


def test_nothing_to_use_is_an_error(tmp_path):
    video(tmp_path / "short.mp4", frames=3)
    with pytest.raises(ValueError, match=r"(?s)no video can be used.*too few"):
        survey(open_source(tmp_path), PHASES, WORDS)


def test_a_video_of_variable_rate_with_sound(tmp_path):
    """Frames at uneven times, and a track of audio: read like any other."""
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 36, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=8000)
        for number, milliseconds in enumerate(range(0, 4500, 33)):
            frame = av.VideoFrame.from_ndarray(np.full((64, 36, 3), number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = milliseconds + 7 * (number % 3), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        for number in range(35):
            wave = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            wave.rate, wave.pts = 8000, 1024 * number
            container.mux(sound.encode(wave))
        container.mux(stream.encode())
        container.mux(sound.encode())
    path.with_suffix(".txt").write_text("a dog runs")
    (row,) = survey(open_source(tmp_path), PHASES, WORDS).used
    assert (row.width, row.height) == (36, 64) and row.phases == ["stage1", "stage2"]


def test_the_command_writes_rows_and_a_sheet(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "found"
    arguments = ["cogvideo", "data", "check", str(folder), "-o", str(out), "--init", "tiny", "--quiet"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--phases", "stage1", "stage2"])
    cli.main()
    rows = json.loads((out / "check.json").read_text())["rows"]
    unknown = {word for row in rows for word in row["unknown"]}
    assert len(rows) == 7 and unknown == {"zyx"} and capsys.readouterr().out == ""
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width == 5 * 96 and sheet.height == 3 * (96 + 16)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tinyworld"], "nothing to check"),
        (["nowhere"], "no captioned videos"),
        ([".", "--recipe", "huge"], "unknown recipe"),
        (["."], "no captioned videos"),
    ],
)
def test_what_cannot_be_checked_is_said(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cogvideo", "data", "check", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert says in capsys.readouterr().err

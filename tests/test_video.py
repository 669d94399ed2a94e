"""Clips come back from their files as they were, files appear whole, a video is read where it is asked."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from cogvideo import video
from cogvideo.video import Clip, VideoFile, check_output, read_image

AS_ROOT = getattr(os, "geteuid", lambda: 0)() == 0


def gradient(count: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames whose brightness says their number (20 levels a frame) over a slope from left to right."""
    levels = np.arange(count)[:, None, None, None] * 20 % 240 + np.linspace(0, 15, width)[None, None, :, None]
    return np.broadcast_to(levels, (count, height, width, 3)).astype(np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    return [int(round((frame.mean() - 7) / 20)) for frame in frames]


def movie(path, count: int, fps: int, codec: str = "libx264", gop: int = 12) -> None:
    """A film whose frame k has the brightness k / 2, up to 250 and again."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.options = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx" else {}
        for k in range(count):
            frame = np.full((48, 64, 3), k % 500 // 2, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("name, tolerance", [("a.mp4", 3), ("a.gif", 4), ("a.webp", 0)])
@pytest.mark.parametrize("fps", [1.0, 8.0, 24.0])
def test_what_is_saved_is_what_is_loaded(tmp_path, name, tolerance, fps):
    clip = Clip(gradient(), fps, "a 狗 runs")
    clip.save(tmp_path / name)
    back = Clip.load(tmp_path / name)
    assert back.frames.shape == clip.frames.shape and back.fps == pytest.approx(fps, rel=0.01)
    assert np.abs(back.frames.astype(int) - clip.frames).max() <= tolerance
    assert back.caption == ("a 狗 runs" if name == "a.mp4" else "")


def test_colours_stay(tmp_path):
    colours = np.array([(220, 30, 40), (30, 200, 60), (40, 60, 220), (250, 250, 250), (5, 5, 5)], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (5, 32, 32, 3)).copy()
    for name in ("a.mp4", "a.gif", "a.webp"):
        Clip(frames, 8).save(tmp_path / name)
        assert np.abs(Clip.load(tmp_path / name).frames.mean((1, 2)) - colours).max() < 4, name


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_frames_that_rest_are_not_lost(tmp_path, name):
    frames = gradient(30)[np.r_[[0] * 14, 1:4, [4] * 2, 5:8, [8] * 7]]
    Clip(frames, 8).save(tmp_path / name)
    assert numbers(Clip.load(tmp_path / name).frames) == numbers(frames)


def test_odd_sides_grow_by_a_pixel_in_video_only(tmp_path):
    frames = gradient(3, 33, 47)
    for name, shape in (("a.mp4", (34, 48)), ("a.gif", (33, 47)), ("a.webp", (33, 47))):
        Clip(frames, 8).save(tmp_path / name)
        back = Clip.load(tmp_path / name).frames
        assert back.shape[1:3] == shape and np.abs(back[:, :33, :47].astype(int) - frames).max() <= 4


def test_video_is_made_for_every_player(tmp_path):
    import av

    Clip(gradient(), 8).save(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before all of it has come


def test_pictures_and_folders(tmp_path):
    clip = Clip(gradient(), 8)
    clip.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as strip:
        assert np.array_equal(np.asarray(strip), np.concatenate(list(clip.frames), axis=1))
    clip.save(tmp_path / "new" / "frames")
    assert (tmp_path / "new" / "frames" / "0011.png").exists()
    back = Clip.load(tmp_path / "new" / "frames", fps=4)
    assert np.array_equal(back.frames, clip.frames) and back.fps == 4
    with pytest.raises(ValueError, match="a folder is in its place"):
        clip.save(tmp_path / "new" / "frames")


def test_a_killed_save_leaves_what_was_there(tmp_path):
    Clip(gradient(), 8).save(tmp_path / "a.mp4")
    before = (tmp_path / "a.mp4").read_bytes()
    noise = "np.random.default_rng(0).integers(0, 256, (99, 480, 480, 3), np.uint8)"
    save = f"Clip({noise}, 8).save({str(tmp_path / 'a.mp4')!r})"
    code = f"import numpy as np; from cogvideo.video import Clip; {save}"
    process = subprocess.Popen([sys.executable, "-c", code])
    while process.poll() is None and len(list(tmp_path.iterdir())) == 1:
        time.sleep(0.01)
    process.kill()
    assert process.wait() != 0 and (tmp_path / "a.mp4").read_bytes() == before
    assert all(p.name == "a.mp4" or p.name.startswith(".") for p in tmp_path.iterdir())


def test_a_failed_save_cleans_up(tmp_path):
    with pytest.raises(OverflowError):
        Clip(gradient(), 1e-9).save(tmp_path / "a.gif")  # frames too long for the format
    assert not list(tmp_path.iterdir())


def test_check_output_speaks_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=r"\.mp4, \.gif, \.webp, \.png"):
        check_output("clip.avi")
    for bad in ("file", "folder.mp4", "file/a.mp4", "file/deep/a.gif"):
        with pytest.raises(ValueError, match="cannot write"):
            check_output(tmp_path / bad)
    for good in ("a.mp4", "A.GIF", "deep/er/a.webp", "frames"):
        assert check_output(tmp_path / good) == tmp_path / good
    assert not (tmp_path / "deep").exists()


@pytest.mark.skipif(AS_ROOT, reason="root may write anywhere")
def test_a_locked_folder_is_found_out(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="written to"):
        check_output(tmp_path / "a.mp4")


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.mp4").write_bytes(b"")
    for name in ("text.mp4", "short.mp4", "missing.mp4", "missing.gif", "empty", "text.png", "a.doc"):
        with pytest.raises(ValueError, match=name) as error:
            Clip.load(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="webm"):
        VideoFile.open(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match="text.png"):
        read_image(tmp_path / "text.png", 48)
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "0.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "empty" / "1.png")
    with pytest.raises(ValueError, match="not of one size"):
        Clip.load(tmp_path / "empty")


def test_an_image_is_its_middle_square(tmp_path):
    picture = np.zeros((40, 120, 3), np.uint8)
    picture[:, 40:80] = (10, 200, 30)
    Image.fromarray(picture).save(tmp_path / "a.png")
    for size in (10, 40, 64):
        assert np.abs(read_image(tmp_path / "a.png", size).astype(int) - (10, 200, 30)).max() <= 1
    checks = np.indices((40, 40)).sum(0) % 2 * 255
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "b.png")
    assert np.abs(read_image(tmp_path / "b.png", 20).astype(int) - 127).max() <= 1  # a mean, not a choice
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "c.png")
    assert (read_image(tmp_path / "c.png", 8) == 255).all()  # clear is white


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.avi", "a.webm"])
def test_a_video_is_read_at_any_time_in_any_order(tmp_path, name):
    movie(tmp_path / name, 200, 25, {"webm": "libvpx", "avi": "mpeg4"}.get(name[2:], "libx264"))
    film = VideoFile.open(tmp_path / name)
    assert film.fps == 25 and film.seconds == pytest.approx(199 / 25, abs=0.002)
    for times in ([0, 0.4, 0.8], [6.6, 3.2, 4.0], [7.9, 7.96, 99.0], [-1.0]):
        frames = film.frames(times, 16)
        assert frames.shape == (len(times), 16, 16, 3)
        expected = [min(max(round(25 * t), 0), 199) / 2 for t in times]
        assert np.abs(frames.mean((1, 2, 3)) - expected).max() < 3, times
    from_memory = VideoFile.open((tmp_path / name).read_bytes(), "a film")
    assert np.array_equal(from_memory.frames([3.3], 16), film.frames([3.3], 16))


def test_exact_frames_at_exact_times(tmp_path):
    Clip(gradient(12), 8).save(tmp_path / "a.mp4")
    film = VideoFile.open(tmp_path / "a.mp4")
    assert film.seconds == 11 / 8
    assert numbers(film.frames(np.arange(12) / 8, 48)) == list(range(12))
    assert numbers(film.frames([0.05, 0.07, 0.5, 0.5], 48)) == [0, 1, 4, 4]


def test_a_long_video_is_not_read_whole(tmp_path, monkeypatch):
    movie(tmp_path / "a.mp4", 2000, 25)
    film, decoded = VideoFile.open(tmp_path / "a.mp4"), []
    spans = video._spans
    monkeypatch.setattr(video, "_spans", lambda frames: spans(decoded.append(f) or f for f in frames))
    film.frames([70.0, 70.2], 16)
    assert len(decoded) < 80


def test_a_phone_held_upright(tmp_path):
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    frames[:, :10] = 255  # bright above
    Clip(frames, 8).save(tmp_path / "a.mp4")
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = data.index(b"tkhd") + 44  # the matrix of the track: a quarter clockwise
    matrix = np.array([0, 65536, 0, -65536, 0, 0, 48 * 65536, 0, 1 << 30], ">i4").tobytes()
    data[at : at + 36] = matrix
    (tmp_path / "b.mp4").write_bytes(data)
    back = Clip.load(tmp_path / "b.mp4").frames
    assert back.shape == (4, 64, 48, 3) and back[:, :, -8:].min() > 200 and back[:, :, :30].max() < 50
    assert VideoFile.open(tmp_path / "b.mp4").frames([0], 48)[0, :, -8:].min() > 200

"""Clips come back from their files as they were, files appear whole, a video is read where it is asked."""

import os
import signal
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import pytest
from PIL import Image

from cogvideo import video
from cogvideo.data.tinyworld import TinyWorld, sprites
from cogvideo.video import Clip, VideoFile, check_output, read_image

PILLOW = int(PIL.__version__.partition(".")[0])
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


SAVE = """
import os, sys
if sys.argv[3] == "1":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np
from cogvideo.video import Clip
Clip(np.load(sys.argv[1]), 8, "a dog").save(sys.argv[2])
"""


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".png"])
def test_the_same_clip_is_the_same_bytes(tmp_path, suffix):
    """Again, by threads at a time, by another process, and on one core: with x264's macroblock tree no two
    runs agreed, and with its own choice of threads one core and two did not."""
    frames = TinyWorld(sprites(4), seed=1)[3].frames(np.arange(17) / 8, 96)
    noise = np.random.default_rng(0).integers(-6, 7, frames.shape)  # as generated clips have
    clip = Clip(np.clip(frames + noise, 0, 255).astype(np.uint8), 8, "a dog")
    paths = [tmp_path / f"{i}{suffix}" for i in range(10)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(clip.save, paths[:8]))
    np.save(tmp_path / "frames.npy", clip.frames)
    for path, cores in zip(paths[8:], "01" if hasattr(os, "sched_setaffinity") else "00"):
        subprocess.run([sys.executable, "-c", SAVE, tmp_path / "frames.npy", path, cores], check=True)
    assert len({path.read_bytes() for path in paths}) == 1


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
    """Killed at the last moment, before the new file takes the name of the old one."""
    Clip(gradient(), 8).save(tmp_path / "a.mp4")
    before = (tmp_path / "a.mp4").read_bytes()
    code = f"""
import os, signal
import numpy as np
from cogvideo.video import Clip

os.replace = lambda old, new: os.kill(os.getpid(), signal.SIGKILL)
Clip(np.zeros((3, 48, 48, 3), np.uint8), 8).save({str(tmp_path / "a.mp4")!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (tmp_path / "a.mp4").read_bytes() == before
    left = [path for path in tmp_path.iterdir() if path.name != "a.mp4"]
    assert len(left) == 1 and left[0].name.startswith(".") and left[0].stat().st_size > 0


def test_a_failed_save_cleans_up(tmp_path):
    with pytest.raises((OverflowError, struct.error)):  # by the version of Pillow
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


GREY = np.linspace(0, 65535, 48 * 48).reshape(48, 48)  # of 16 bits
LEVELS = GREY / 257  # what it looks like


def through(tmp_path, image: Image.Image, name: str, **options) -> np.ndarray:
    image.save(tmp_path / name, **options)
    return read_image(tmp_path / name, min(image.size)).astype(float)


@pytest.mark.parametrize(
    "name, pixels",
    [
        ("a.png", GREY.astype(np.uint16)),
        ("a.tif", GREY.astype(np.uint16)),
        ("a.tif", GREY.astype(">u2")),
        ("a.pgm", GREY.astype(np.int32)),
        ("a.tif", GREY.astype(np.int32)),
        ("a.tif", LEVELS.astype(np.int32)),
        ("a.tif", (30000 * GREY - 10**9).astype(np.int32)),
        ("a.tif", (GREY / 65535).astype(np.float32)),
        ("a.tif", LEVELS.astype(np.float32)),
        ("a.tif", (3 * GREY - 70000).astype(np.float32)),
        ("a.tif", (GREY / 50000 - 0.2).astype(np.float32)),
        ("a.pfm", (GREY / 65535).astype(np.float32)),
    ],
    ids=lambda value: getattr(value, "dtype", value),
)
def test_grey_of_any_depth_keeps_its_range(tmp_path, name, pixels):
    """16-bit grey once became white, and floating point black."""
    read = through(tmp_path, Image.fromarray(pixels), name)
    assert np.abs(read - LEVELS[..., None]).max() <= 1


def test_dark_pictures_of_16_bits_stay_dark(tmp_path):
    dark = np.full((8, 8), 200)
    for name, kind in (("a.png", np.uint16), ("a.tif", np.uint16), ("a.pgm", np.int32)):
        assert through(tmp_path, Image.fromarray(dark.astype(kind)), name).max() <= 1
    for level, expected in ((0.0, 0), (0.5, 128), (1.0, 255), (100.0, 100), (-5.0, 0), (300.0, 0)):
        flat = Image.fromarray(np.full((8, 8), level, np.float32))  # without a range of its own: black
        assert (through(tmp_path, flat, "a.tif") == expected).all()
    holes = (GREY / 65535).astype(np.float32)
    holes[0, :3] = np.nan, np.inf, -np.inf
    assert through(tmp_path, Image.fromarray(holes), "a.tif")[0, :3, 0].tolist() == [0, 255, 0]


def test_colours_of_any_mode_are_read(tmp_path):
    few = np.array([(250, 10, 10), (10, 200, 10), (10, 10, 250), (250, 250, 250)], np.uint8)
    rgb = few[np.indices((32, 32)).sum(0) // 8 % 4]
    image, grey = Image.fromarray(rgb), Image.fromarray(rgb).convert("L")
    best = {"a.jpg": {"quality": 100, "subsampling": 0}, "a.webp": {"lossless": True}}
    for mode, names in {
        "P": ("a.png", "a.gif", "a.tif"),
        "CMYK": ("a.tif", "a.jpg"),
        "YCbCr": ("a.tif",) if PILLOW >= 13 else (),  # older ones cannot read those that they write
        "RGBA": ("a.png", "a.tif"),
        "RGB": ("a.png", "a.webp", "a.bmp"),
    }.items():
        made = image.convert(mode, palette=Image.Palette.ADAPTIVE)
        for name in names:
            read = through(tmp_path, made, name, **best.get(name, {}))
            assert np.abs(read - rgb).max() <= 4, (mode, name)
    for mode, names in {"L": ("a.png", "a.jpg"), "LA": ("a.png", "a.tif")}.items():
        for name in names:
            read = through(tmp_path, grey.convert(mode), name, **best.get(name, {}))
            assert np.abs(read - np.asarray(grey)[..., None]).max() <= 4, (mode, name)
    black = Image.fromarray(rgb[..., 1] > 100)  # 1 bit
    for name in ("a.png", "a.tif"):
        assert np.array_equal(through(tmp_path, black, name), 255.0 * np.repeat(rgb[..., 1:2] > 100, 3, 2))
    half = Image.merge("LA", (Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 128)))
    assert np.abs(through(tmp_path, half, "a.png") - 127).max() <= 1  # over white
    clear = image.convert("P", palette=Image.Palette.ADAPTIVE)
    index = clear.getpixel((0, 0))
    read = through(tmp_path, clear, "a.png", transparency=index)
    assert (read[np.asarray(clear) == index] == 255).all() and (read[np.asarray(clear) != index] < 255).any()


def test_colours_of_16_bits_keep_the_upper_8(tmp_path):
    """Pillow reads them so, and cannot write them: a PNG by hand, a TIFF by tifffile. Colours in floating
    point it does not read at all, which is said in one line."""
    tifffile = pytest.importorskip("tifffile")
    wide = np.stack([GREY, GREY[::-1], GREY.T], -1).astype(np.uint16)
    rows = b"".join(b"\0" + row.tobytes() for row in wide.astype(">u2"))
    header = struct.pack(">IIBBBBB", 48, 48, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "a.png").write_bytes(data)
    tifffile.imwrite(tmp_path / "a.tif", wide, photometric="rgb")
    for name in ("a.png", "a.tif"):
        assert np.array_equal(read_image(tmp_path / name, 48), wide >> 8)
    tifffile.imwrite(tmp_path / "f.tif", wide.astype(np.float32), photometric="rgb")
    with pytest.raises(ValueError, match="cannot read the image .*f.tif: Pillow does not know its format"):
        read_image(tmp_path / "f.tif", 48)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("wide", [False, True])
def test_a_photograph_is_turned_as_it_was_held(tmp_path, name, wide):
    if wide and name not in ("a.png", "a.tif"):
        pytest.skip("of 8 bits only")
    upright = np.repeat(np.repeat(np.array([[0, 60, 120], [255, 180, 30]]), 16, 0), 16, 1)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = np.ascontiguousarray(257 * pixels).astype(np.uint16) if wide else pixels.astype(np.uint8)
        read = through(tmp_path, Image.fromarray(pixels), name, exif=exif)
        middle = upright[:, 8:40, None]
        assert np.abs(read - middle).mean() < 6, orientation


def test_frames_in_a_folder_are_read_like_other_pictures(tmp_path):
    for i in range(3):
        Image.fromarray((GREY / (i + 1)).astype(np.uint16)).save(tmp_path / f"{i}.png")
    frames = Clip.load(tmp_path).frames
    assert np.abs(frames[2].astype(float) - LEVELS[..., None] / 3).max() <= 1


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

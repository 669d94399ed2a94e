"""Clips of frames, and the files they are stored in: video, animated gif and webp, strips, folders of images.

Notable:
- Only this file knows codecs: PyAV (imported when first needed, because it starts slowly) and Pillow.
- A file is written completely or not at all: under a temporary name, which is then renamed.
- Time starts at the first frame and a video ends at its last one: 33 frames at 8 fps are 4 seconds.
- Files are not trusted: their sizes are checked before they are decoded, and every error names the file.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from threading import get_ident
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from cogvideo.files import atomic_path, check_file

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.reformatter import VideoReformatter
    from av.video.stream import VideoStream

Frames = npt.NDArray[np.uint8]  # [F, H, W, 3]; of one image [H, W, 3]

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")  # what `VideoFile` reads
# flags of swscale; without CHROMA colours are a level too dark
AREA = 32
BICUBIC = 4
CHROMA = 8192 | 16384
MOST_PIXELS = 89_478_485  # of an image or a frame: the limit of Pillow
MOST_PIXELS_OF_A_CLIP = 2**30  # of all frames together, where all are in memory
MOST_ASPECT = 100
MOST_SECONDS = 400_000  # of a video, more than four days
LEAST_FPS = 1e-3
MOST_FPS = 1e6
_IMAGES = (".png", ".jpg", ".jpeg")
_READS = f"a video ({', '.join(VIDEOS)}), a .webp or a folder of .png or .jpg frames"
_WRITES = ".mp4, .gif, .webp, .png (all frames side by side) or no extension (a new folder of frames)"


class TooFewFrames(ValueError):
    """A video does not have a frame of its own for each requested time."""


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames uint8 [F, H, W, 3], at `fps` frames per second."""

    frames: Frames
    fps: float
    caption: str = ""

    def __post_init__(self) -> None:
        dtype = self.frames.dtype
        shape = self.frames.shape
        assert dtype == np.uint8 and len(shape) == 4 and shape[0] and shape[3] == 3, f"{dtype} {shape}"

    def square(self, size: int) -> "Clip":
        """The middle squares of the frames at size x size."""
        frames = [np.asarray(_square(Image.fromarray(frame), size)) for frame in self.frames]
        return replace(self, frames=np.stack(frames))

    def save(self, path: str | Path) -> None:
        """Write a file of the kind that the extension names. Raise ValueError where `check_output` does.

        A video stores the caption as its title. Its sides are even: an odd one is padded by a pixel.
        """
        path = check_output(path)
        with atomic_path(path) as part:
            _WRITERS[path.suffix.lower()](self, part)

    @classmethod
    def load(cls, path: str | Path, fps: float = 8.0) -> "Clip":
        """All of a video, gif or webp, or a folder of images as frames, sorted by name, at `fps`.

        Raise ValueError if it is something else or cannot be read.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in _IMAGES)
            if files:
                return cls(_stack((np.asarray(_read_rgb(file)) for file in files), path), fps)
        elif suffix in (".gif", ".webp"):
            return _load_animation(path)
        elif suffix in VIDEOS:
            with _open_video(path, str(path)) as (container, stream):
                frames = _stack(map(_decode, container.decode(stream)), path)
                return cls(frames, _fps(stream, str(path)), container.metadata.get("title", ""))
        raise ValueError(f"cannot read {path}; give {_READS}")


def check_output(path: str | Path) -> Path:
    """Raise ValueError unless a clip can be saved at `path`. To be called before long work, not after."""
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"cannot write {path}: the extension must be {_WRITES}")
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        raise ValueError(f"cannot write {path}: a folder is in its place")
    if path.exists() and not path.is_dir() and not path.suffix:
        raise ValueError(f"cannot write {path}: a file is in its place")
    check_folder(path.parent)
    return path


def check_folder(path: str | Path) -> Path:
    """Raise ValueError unless files can be written into this folder, which need not exist yet."""
    path = Path(path).absolute()
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with TemporaryFile(dir=folder):  # os.access is wrong for root
            return path
    except OSError as error:
        raise ValueError(f"cannot write into {path}: {error.strerror}") from None


def read_image(path: str | Path, size: int) -> Frames:
    """The middle square of an image, uint8 [size, size, 3], on white where it is transparent.

    Photographs are rotated by their orientation tag. Grey images of more than 8 bits are scaled to 8 by their
    range (`_to_bytes`); of 16-bit colours Pillow keeps the upper 8 bits, and it reads no floating-point
    colours. Colour profiles are not applied. Raise ValueError if it is no image that can be read.
    """
    return np.asarray(_square(_read_rgb(Path(path)), size))


@dataclass(frozen=True)
class VideoFile:
    """A video that is read on demand: `frames` seeks, and decodes no more than it needs."""

    name: str  # for messages
    data: Path | bytes  # the path, or the content of the file
    start: float  # timestamp of the first frame, in seconds
    seconds: float  # from the first frame to the last
    fps: float

    @classmethod
    def open(cls, data: str | Path | bytes, name: str = "") -> "VideoFile":
        """Find out start, length and frame rate. Raise ValueError if it is not a video that can be read."""
        if not isinstance(data, bytes):
            data = Path(data)
            name = name or str(data)
        name = name or "a video"
        with _open_video(data, name) as (container, stream):
            fps = _fps(stream, name)
            start = next(container.decode(stream)).time or 0.0
            for time in (container.duration or 0, 0):  # the last packets know the time of the last frame
                container.seek(time + (container.start_time or 0))
                stamps = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
                if stamps:
                    assert stream.time_base is not None
                    seconds = float(max(stamps) * stream.time_base) - start
                    if not 0 <= seconds <= MOST_SECONDS:
                        raise ValueError(f"cannot read {name}: it would last {seconds:g} seconds")
                    return cls(name, data, start, seconds, fps)
        raise ValueError(f"cannot read {name}: its frames have no times")

    @property
    def title(self) -> str:
        """The title that the container stores: the caption, in videos of `Clip.save`."""
        with _open_video(self.data, self.name) as (container, _):
            return str(container.metadata.get("title", ""))

    def frames(
        self, times: Sequence[float] | np.ndarray, size: int | None = None, repeat: bool = True
    ) -> Frames:
        """The frames nearest to `times` (seconds): their middle squares, uint8 [F, size, size, 3], or without
        a size the whole frames [F, H, W, 3].

        Raise TooFewFrames, unless `repeat`, if one frame is the nearest to two of the times.
        """
        times = np.asarray(times, np.float64) + self.start
        images: list[Frames | None] = [None] * len(times)
        waiting = list(np.argsort(-times, kind="stable"))  # the next one is the last of the list
        with _open_video(self.data, self.name) as (container, stream):
            if times.min() > self.start + 2:  # a second early: some files seek by the time of decoding
                container.seek(int((times.min() - 1) * 1e6))
            for frame, until in _spans(container.decode(stream)):
                uses = 0
                while waiting and times[waiting[-1]] <= until:
                    if not uses:
                        image = _decode(frame, size)
                    images[waiting.pop()] = image
                    uses += 1
                if uses > 1 and not repeat:
                    raise TooFewFrames(f"{self.name} has too few frames at {frame.time - self.start:.2f} s")
                if not waiting:
                    return np.stack([image for image in images if image is not None])
        raise ValueError(f"cannot read {self.name}: no frames at {times - self.start} seconds")


@contextmanager
def _open_video(data: Path | bytes, name: str) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Yield container and video stream. What PyAV raises becomes a ValueError."""
    import av

    file = BytesIO(data) if isinstance(data, bytes) else str(data)
    try:
        if isinstance(data, Path):
            check_file(data)
        with av.open(file, "r", metadata_errors="replace") as container:
            if not container.streams.video:
                raise ValueError(f"cannot read {name}: it has sound but no images")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError(f"cannot read {name}: nothing here decodes it; give {_READS}")
            _check_size(stream.width, stream.height, name)
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # sizes may change within it
            yield container, stream
    except (av.FFmpegError, OSError, StopIteration, ArithmeticError, MemoryError) as error:
        why = getattr(error, "strerror", None) or "it is damaged"
        if isinstance(error, StopIteration):
            why = "it has no frames"
        raise ValueError(f"cannot read {name}: {why}; give {_READS}") from error


def _check_size(width: int, height: int, name: object) -> None:
    """Raise ValueError for frames that fill the memory, as they are or resized to a side."""
    if width * height > MOST_PIXELS or max(width, height) > MOST_ASPECT * max(1, min(width, height)):
        raise ValueError(f"cannot read {name}: its frames of {width}x{height} pixels are too large or narrow")


def _fps(stream: "VideoStream", name: str) -> float:
    fps = float(stream.average_rate or stream.guessed_rate or 1)
    if not LEAST_FPS <= fps <= MOST_FPS:
        raise ValueError(f"cannot read {name}: it would have {fps:g} frames a second")
    return fps


def _stack(images: Iterable[Frames], path: Path) -> Frames:
    """Frames of one size as [F, H, W, 3]; ValueError if they are none, differ, or fill the memory."""
    frames: list[Frames] = []
    pixels = 0
    for image in images:
        pixels += image.shape[0] * image.shape[1]
        if pixels > MOST_PIXELS_OF_A_CLIP:
            raise ValueError(f"cannot read {path}: its frames are too many or too large for memory")
        if frames and image.shape != frames[0].shape:
            raise ValueError(f"cannot read {path}: its frames are not of one size")
        frames.append(image)
    if not frames:
        raise ValueError(f"cannot read {path}: it has no frames")
    return np.stack(frames)


def _spans(frames: Iterable["av.VideoFrame"]) -> Iterator[tuple["av.VideoFrame", float]]:
    """Each frame with the time up to which it is the nearest one; frames without a time are skipped."""
    previous = None
    for frame in frames:
        if frame.time is None:
            continue
        if previous is not None:
            yield previous, (previous.time + frame.time) / 2
        previous = frame
    if previous is not None:
        yield previous, np.inf


def _decode(frame: "av.VideoFrame", size: int | None = None) -> Frames:
    """A decoded frame, rotated by its orientation tag, uint8 [H, W, 3]; with a size its middle square.

    The frame is resized before it is cropped; a smaller pixel is the mean over its area.
    """
    width, height = frame.width, frame.height
    if size is not None:
        side = min(width, height)
        width = round(width * size / side)
        height = round(height * size / side)
    method = CHROMA | (AREA if width < frame.width else BICUBIC)
    converter = _converter(get_ident(), frame.width, frame.height, frame.format.name, width, height)
    rgb = converter.reformat(frame, width, height, "rgb24", interpolation=method, threads=1).to_ndarray()
    if size is not None:
        top = (rgb.shape[0] - size) // 2
        left = (rgb.shape[1] - size) // 2
        rgb = rgb[top : top + size, left : left + size]
    return np.rot90(rgb, frame.rotation // 90)


@lru_cache(256)
def _converter(thread: int, *sizes: int | str) -> "VideoReformatter":
    """The converter for frames of these sizes. Building one takes as long as decoding a second of video;
    threads must not share one."""
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Yield an image or animation. Raise ValueError, with the file, for whatever Pillow raises meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            check_file(path)
            # from memory: from a path, Pillow 13 reads rows of a rotated, uncompressed TIFF in wrong order
            with Image.open(BytesIO(path.read_bytes())) as image:
                yield image
        except UnidentifiedImageError:
            raise ValueError(f"cannot read the image {path}: Pillow does not know its format") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise ValueError(f"cannot read the image {path}: it has more than {MOST_PIXELS} pixels") from None
        except Exception as error:  # of many formats: struct.error, zlib.error, KeyError ...
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            why = why.removeprefix(f"cannot read {path}: ")
            raise ValueError(f"cannot read the image {path}: {why}") from error


def _read_rgb(path: Path) -> Image.Image:
    """An image of any mode as RGB."""
    with open_image(path) as stored:
        return _as_rgb(stored)


def _as_rgb(stored: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(stored)
    if image.mode[0] in "IF":
        wide = image.mode[0] == "I" and stored.format in ("PNG", "PPM")  # Pillow may read their 16 bits as 32
        image = Image.fromarray(_to_bytes(np.asarray(image), wide))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_bytes(pixels: np.ndarray, wide: bool = False) -> Frames:
    """Grey pixels of any dtype to uint8, both [H, W], scaled from the range that they presumably use.

    For 16-bit integers, and if `wide`, this is 0 to 65535. Otherwise it is the first that holds all pixels:
    0 to 1 for floats; 0 to 255; 0 to 65535 for integers; else from their minimum to their maximum. NaN
    becomes black, infinity the end of the range.
    """
    if wide or pixels.dtype.itemsize == 2:
        tops = [65535.0]
    elif np.issubdtype(pixels.dtype, np.integer):
        tops = [255.0, 65535.0]
    else:
        tops = [1.0, 255.0]

    values = pixels.astype(np.float64)
    finite = values[np.isfinite(values)]
    low = float(finite.min()) if len(finite) else 0.0
    high = float(finite.max()) if len(finite) else 0.0
    fitting = [top for top in tops if low >= 0 and high <= top]
    if fitting:
        low = 0.0
        high = fitting[0]
    levels = 255 * (values.clip(low, high) - low) / (high - low or 1.0)
    return np.nan_to_num(levels).round().astype(np.uint8)


def _square(image: Image.Image, size: int) -> Image.Image:
    """The middle square at size x size; if `size` divides its side, a pixel is the mean over its area."""
    side = min(image.size)
    method = Image.Resampling.BICUBIC if side % size else Image.Resampling.BOX
    return crop_centre(image, side).resize((size, size), method)


def crop_centre(image: Image.Image, side: int) -> Image.Image:
    """The middle square of `side` pixels."""
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _load_animation(path: Path) -> Clip:
    """A gif or webp. Their writers merge equal frames into a longer one: these are repeated again."""
    durations: list[float] = []  # milliseconds

    def images(animation: Image.Image) -> Iterator[Frames]:
        for frame in ImageSequence.Iterator(animation):
            pixels = np.asarray(frame.convert("RGB"))  # of a webp, this finds out the duration
            durations.append(max(1.0, float(frame.info.get("duration") or 100)))
            yield pixels

    with open_image(path) as animation:
        _check_size(*animation.size, path)
        frames = _stack(images(animation), path)
    spans = np.stack(durations)
    single = spans[spans < 1.5 * spans.min()].mean()  # the duration of a single frame, but for rounding
    counts = np.maximum(np.round(spans / single), 1).astype(int)
    if counts.sum() * frames[0].size > 3 * MOST_PIXELS_OF_A_CLIP:
        raise ValueError(f"cannot read {path}: its frames last too long for memory")
    fps = float(1000 * counts.sum() / spans.sum())
    return Clip(np.repeat(frames, counts, axis=0), fps)


def _save_video(clip: Clip, path: Path) -> None:
    """H.264 in 4:2:0 with the index in front, which every player and browser shows.

    The same frames give the same bytes: one thread and no macroblock tree, because x264's results depend on
    the number of threads, and its macroblock tree differs from run to run.
    """
    import av

    height, width = clip.frames.shape[1:3]
    frames = np.pad(clip.frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["title"] = clip.caption
        stream = container.add_stream("libx264", rate=Fraction(clip.fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16", "mbtree": "0", "threads": "1"}
        stream.codec_context.colorspace = 6  # BT.601, as PyAV converts; players guess if it is not stored
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _save_animation(clip: Clip, path: Path) -> None:
    unit = (
        10 if path.suffix.lower() == ".gif" else 1
    )  # milliseconds; edges are rounded, so errors do not add up
    edges = np.round(np.arange(len(clip.frames) + 1) * 1000 / clip.fps / unit) * unit
    first, *rest = (Image.fromarray(frame) for frame in clip.frames)
    first.save(
        path,
        save_all=True,
        append_images=rest,
        duration=np.diff(edges).astype(int).tolist(),
        loop=0,
        lossless=True,
    )


def _save_images(clip: Clip, path: Path) -> None:
    if path.suffix:
        Image.fromarray(np.concatenate(list(clip.frames), axis=1)).save(path)
        return
    path.mkdir()
    for i, frame in enumerate(clip.frames):
        Image.fromarray(frame).save(path / f"{i:04d}.png")


_WRITERS = {
    ".mp4": _save_video,
    ".gif": _save_animation,
    ".webp": _save_animation,
    ".png": _save_images,
    "": _save_images,
}

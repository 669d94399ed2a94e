"""Clips of frames, and the files they live in: video, animated gif and webp, strips and folders of pictures.

Notable:
- The only room that knows codecs: PyAV (imported when first needed, it is slow to start) and pillow.
- A file appears whole or not at all: it is written under another name beside its place, then renamed.
- Time starts at the first frame and a video ends at its last one: 33 frames at 8 fps are 4 seconds.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from threading import get_ident

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from cogvideo.files import replacing

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")  # what `VideoFile` reads
AREA, BICUBIC, CHROMA = 32, 4, 8192 | 16384  # of swscale; without CHROMA colours come out a level too dark
_PICTURES = (".png", ".jpg", ".jpeg")
_READS = f"a video ({', '.join(VIDEOS)}), a .webp or a folder of .png or .jpg frames"
_WRITES = ".mp4, .gif, .webp, .png (all frames side by side) or no extension (a new folder of frames)"


class TooFewFrames(ValueError):
    """A video does not have a frame for each time that was asked for."""


@dataclass(frozen=True, eq=False)
class Clip:
    frames: np.ndarray  # uint8 [F, H, W, 3]
    fps: float
    caption: str = ""

    def __post_init__(self):
        kind, shape = self.frames.dtype, self.frames.shape
        assert kind == np.uint8 and len(shape) == 4 and shape[0] and shape[3] == 3, f"{kind} {shape}"

    def square(self, size: int) -> "Clip":
        """The middle squares of the frames at size x size."""
        frames = [np.asarray(_square(Image.fromarray(frame), size)) for frame in self.frames]
        return replace(self, frames=np.stack(frames))

    def save(self, path: str | Path) -> None:
        """Write the kind of file that the extension says; raises ValueError where `check_output` does.

        A video keeps the caption as its title. Its sides are even: an odd one grows by a pixel.
        """
        path = check_output(path)
        with replacing(path) as part:
            _WRITERS[path.suffix.lower()](self, part)

    @classmethod
    def load(cls, path: str | Path, fps: float = 8.0) -> "Clip":
        """All of a video, gif or webp, or of a folder of frames in the order of their names, shown at `fps`.

        Raises ValueError if it is something else or cannot be read.
        """
        path, suffix = Path(path), Path(path).suffix.lower()
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in _PICTURES)
            pictures = [_read_picture(file) for file in files]
            if len({picture.size for picture in pictures}) == 1:
                return cls(np.stack([np.asarray(picture) for picture in pictures]), fps)
            if pictures:
                raise ValueError(f"cannot read {path}: its frames are not of one size")
        elif suffix in (".gif", ".webp"):
            return _load_animation(path)
        elif suffix in VIDEOS:
            with _opened(path, str(path)) as (container, stream):
                frames = np.stack([_picture(frame) for frame in container.decode(stream)])
                return cls(frames, _rate(stream), container.metadata.get("title", ""))
        raise ValueError(f"cannot read {path}; give {_READS}")


def check_output(path: str | Path) -> Path:
    """Raise ValueError unless a clip can be saved at `path`: to be asked before hours of work, not after."""
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"cannot write {path}: the extension must be {_WRITES}")
    if (path.suffix or any(path.iterdir())) if path.is_dir() else (path.exists() and not path.suffix):
        raise ValueError(f"cannot write {path}: a {'folder' if path.is_dir() else 'file'} is in its place")
    check_folder(path.parent)
    return path


def check_folder(path: str | Path) -> Path:
    """Raise ValueError unless files can be written into this folder, which need not be there yet."""
    path = Path(path).absolute()
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with TemporaryFile(dir=folder):  # os.access does not know what root may not either
            return path
    except OSError as error:
        raise ValueError(f"cannot write into {path}: {error.strerror}") from None


def read_image(path: str | Path, size: int) -> np.ndarray:
    """The middle square, on white where it is clear, uint8 [size, size, 3]; ValueError if not a picture.

    A photograph is turned as the camera was held. Grey pictures of more than 8 bits are brought to 8 by their
    range (`_to_bytes`); of colours with 16 bits Pillow keeps the upper 8, and it reads no colours in floating
    point. Colour profiles are not applied.
    """
    return np.asarray(_square(_read_picture(Path(path)), size))


@dataclass(frozen=True)
class VideoFile:
    """A video that stays where it is: `frames` seeks, and decodes no more than it has to."""

    name: str  # for messages
    data: Path | bytes  # where it is, or the file itself
    start: float  # the time of the first frame in the file's own count
    seconds: float  # from the first frame to the last
    fps: float

    @classmethod
    def open(cls, data: str | Path | bytes, name: str = "") -> "VideoFile":
        """Raises ValueError if it is not a video that can be read."""
        data = data if isinstance(data, bytes) else Path(data)
        name = name or str("a video" if isinstance(data, bytes) else data)
        with _opened(data, name) as (container, stream):
            start = next(container.decode(stream)).time or 0.0
            for place in (container.duration or 0, 0):  # the packets at the end tell where the last frame is
                container.seek(place + (container.start_time or 0))
                times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
                if times:
                    return cls(name, data, start, float(max(times) * stream.time_base) - start, _rate(stream))
        raise ValueError(f"cannot read {name}: its frames have no times")

    def frames(self, times: Sequence[float] | np.ndarray, size: int, repeat: bool = True) -> np.ndarray:
        """The middle squares of the frames nearest to `times` (seconds), uint8 [F, size, size, 3].

        TooFewFrames, unless `repeat`, if a frame is the nearest to two of them.
        """
        times = np.asarray(times, np.float64) + self.start
        out = np.empty((len(times), size, size, 3), np.uint8)
        left = list(np.argsort(-times, kind="stable"))  # the next one is the last of the list
        with _opened(self.data, self.name) as (container, stream):
            if times.min() > self.start + 2:  # a second early: some files count by the time of decoding
                container.seek(int((times.min() - 1) * 1e6))
            for frame, until in _spans(container.decode(stream)):
                if times[left[-1]] <= until:
                    picture = _picture(frame, size)
                taken = 0
                while left and times[left[-1]] <= until:
                    out[left.pop()], taken = picture, taken + 1
                if taken > 1 and not repeat:
                    raise TooFewFrames(f"{self.name} has too few frames at {frame.time - self.start:.2f} s")
                if not left:
                    return out
        raise ValueError(f"cannot read {self.name}: no frames at {times - self.start} seconds")


@contextmanager
def _opened(data: Path | bytes, name: str) -> Iterator[tuple]:
    """Container and video stream; whatever is wrong with them becomes a ValueError."""
    import av

    try:
        with av.open(BytesIO(data) if isinstance(data, bytes) else str(data)) as container:
            if not container.streams.video:
                raise ValueError(f"cannot read {name}: it has sound but no pictures")
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError, StopIteration) as error:
        why = getattr(error, "strerror", None) or "it has no frames"
        raise ValueError(f"cannot read {name}: {why}; give {_READS}") from error


def _rate(stream) -> float:
    return float(stream.average_rate or stream.guessed_rate or 1)


def _spans(frames: Iterable) -> Iterator[tuple]:
    """Each frame with the time up to which it is the nearest one."""
    before = None
    for frame in (frame for frame in frames if frame.time is not None):
        if before is not None:
            yield before, (before.time + frame.time) / 2
        before = frame
    if before is not None:
        yield before, np.inf


def _picture(frame, size: int | None = None) -> np.ndarray:
    """A decoded frame, turned as the camera was held, uint8 [H, W, 3]; with a size its middle square, made
    small before it is cut out, by the mean over areas."""
    width, height = frame.width, frame.height
    if size is not None:
        side = min(width, height)
        width, height = round(width * size / side), round(height * size / side)
    how = CHROMA | (AREA if width < frame.width else BICUBIC)
    convert = _converter(get_ident(), frame.width, frame.height, frame.format.name, width, height).reformat
    made = convert(frame, width, height, "rgb24", interpolation=how, threads=1).to_ndarray()
    if size is not None:
        top, left = (made.shape[0] - size) // 2, (made.shape[1] - size) // 2
        made = made[top : top + size, left : left + size]
    return np.rot90(made, frame.rotation // 90)


@lru_cache(256)
def _converter(thread: int, *sizes: int | str):
    """What frames of these sizes are converted with. Making one takes as long as decoding a second of video;
    threads must not share one."""
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def _open_image(path: Path) -> Image.Image:
    try:  # from memory: by a path, Pillow 13 reads the pixels of a turned, uncompressed TIFF in wrong rows
        image = Image.open(BytesIO(path.read_bytes()))
        image.load()
        return image
    except UnidentifiedImageError:
        raise ValueError(f"cannot read the picture {path}: it is of no kind that Pillow reads") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {path}: {error}") from error


def _read_picture(path: Path) -> Image.Image:
    """A picture of any mode as RGB."""
    opened = _open_image(path)
    image = ImageOps.exif_transpose(opened)
    if image.mode[0] in "IF":
        wide = image.mode[0] == "I" and opened.format in ("PNG", "PPM")  # their 16 bits may come as 32
        image = Image.fromarray(_to_bytes(np.asarray(image), wide))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_bytes(pixels: np.ndarray, wide: bool = False) -> np.ndarray:
    """Grey pixels of any kind to uint8, both [H, W], by the range that they mean.

    Of 16-bit integers, and of all that are `wide`, this is 0 to 65535. Of others it is the first that holds
    all pixels: 0 to 1 for floats; 0 to 255; 0 to 65535 for integers; else their own least to their own most.
    Not a number is black, infinity is the end of the range.
    """
    wide = wide or pixels.dtype.itemsize == 2
    whole = np.issubdtype(pixels.dtype, np.integer)
    tops = (65535.0,) if wide else (255.0, 65535.0) if whole else (1.0, 255.0)
    values = pixels.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    fitting = [top for top in tops if low >= 0 and high <= top]
    if fitting:
        low, high = 0.0, fitting[0]
    levels = 255 * (values.clip(low, high) - low) / (high - low or 1.0)
    return np.nan_to_num(levels).round().astype(np.uint8)


def _square(image: Image.Image, size: int) -> Image.Image:
    """The middle square at size x size; where the sides divide, a pixel is the mean over what it covers."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    how = Image.Resampling.BICUBIC if side % size else Image.Resampling.BOX
    return image.crop((left, top, left + side, top + side)).resize((size, size), how)


def _load_animation(path: Path) -> Clip:
    """A gif or webp. Their writers join equal frames into a longer one: these are taken apart again."""
    with _open_image(path) as image:
        shown = [
            (np.asarray(frame.convert("RGB")), frame.info.get("duration") or 100)  # milliseconds
            for frame in ImageSequence.Iterator(image)
        ]
    frames, spans = (np.stack(column) for column in zip(*shown))
    one = spans[spans < 1.5 * spans.min()].mean()  # of a single frame, but for rounding
    counts = np.maximum(np.round(spans / one), 1).astype(int)
    return Clip(np.repeat(frames, counts, axis=0), float(1000 * counts.sum() / spans.sum()))


def _save_video(clip: Clip, path: Path) -> None:
    """H.264 in 4:2:0 with the index in front, which every player and browser shows.

    The same frames give the same bytes: x264's macroblock tree differs from run to run, and its result with
    the number of its threads, which would be that of the cores.
    """
    import av

    height, width = clip.frames.shape[1:3]
    frames = np.pad(clip.frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["title"] = clip.caption
        stream = container.add_stream("libx264", rate=Fraction(clip.fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "16", "mbtree": "0", "threads": "1"}
        stream.codec_context.colorspace = 6  # BT.601, as PyAV converts: without a word players guess by size
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _save_animation(clip: Clip, path: Path) -> None:
    unit = 10 if path.suffix.lower() == ".gif" else 1  # milliseconds; what rounding takes must not add up
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


def _save_pictures(clip: Clip, path: Path) -> None:
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
    ".png": _save_pictures,
    "": _save_pictures,
}

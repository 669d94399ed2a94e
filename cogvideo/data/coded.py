"""Videos as codes, in webdataset shards: each is decoded and encoded once, and trained on many times.

`cogvideo data tokenize` writes a folder:

    tokens.json                 the tokenizer's digest, the videos that were left out and why
    000000.tar ...              of every video KEY.codes.npy, uint16 [F, N], and KEY.json: captions and fps

Codes are of 8 frames a second, or of fewer where a video has fewer; clips at lower rates are cut out of
them. A shard is written completely or not at all, so an interrupted call resumes at the next one.
"""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch

from cogvideo.cluster import spread
from cogvideo.data.videos import CaptionedVideo, Videos, choose_caption
from cogvideo.files import (
    TAR_ERRORS,
    atomic_path,
    check_file,
    only_writer,
    parse_json,
    read_json,
    remove_parts,
    write_json,
)
from cogvideo.model.config import ConfigError, Range, read_table
from cogvideo.model.vqvae import VQVAE, to_images
from cogvideo.progress import Progress
from cogvideo.video import Frames, TooFewFrames

TABLE = "tokens.json"
RATES = (8.0, 4.0, 2.0, 1.0)  # the first at which a video has a frame for every time
VIDEOS_A_SHARD = 64
TOGETHER = 32  # frames encoded at a time
MOST_BYTES = 2**20  # of KEY.json
SKIPPED = "skipped"  # member of a shard: the videos of its numbers that cannot be used

Codes = npt.NDArray[np.uint16]  # [F, N]
Encode = Callable[[Frames], Codes]  # frames [F, size, size, 3] to codes


@dataclass(frozen=True)
class Table:
    """The content of tokens.json."""

    tokenizer: str  # digest of its weights
    size: int  # pixels a side of the frames that were encoded
    videos: int
    source: str  # digest of the names and captions of the videos
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """KEY.json: what is stored of one video besides its codes."""

    name: str
    captions: tuple[str, ...]
    fps: Annotated[float, Range(1e-3, 1e6)]

    def __post_init__(self) -> None:
        if not self.captions:
            raise ValueError("captions are missing")


def digest(vqvae: VQVAE) -> str:
    """SHA-256 of the weights that decide codes: the encoder and the codebook."""
    sha = sha256()
    for name, tensor in sorted(vqvae.state_dict().items()):
        if not name.startswith("decoder."):
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().double().numpy().tobytes())
    return sha.hexdigest()


def write_shards(
    source: Videos,
    encode: Encode,
    tokenizer: str,
    size: int,
    out: Path,
    progress: Progress | None = None,
    workers: int = 0,
    ray: str | None = None,
) -> Table:
    """Encode every video of a source into shards in `out`; those that are there already are kept. `workers`
    processes, or the machines of a Ray cluster, encode a shard each (`cluster.spread`).

    ValueError if `out` holds shards of other videos or another tokenizer, if another process writes there, or
    if no video can be used.
    """
    described = sha256(repr([(entry.name, entry.captions) for entry in source.entries]).encode()).hexdigest()
    with only_writer(out):
        _check_begun(out, {"tokenizer": tokenizer, "size": size, "source": described})
        shards = _shards(source.count)
        missing = [name for name in shards if not (out / name).exists()]
        done = source.count - sum(len(shards[name]) for name in missing)
        encode_shard = partial(_encode_shard, source, encode, size)
        contents = spread(encode_shard, [shards[name] for name in missing], workers, ray)
        for name, content in zip(missing, contents):
            with atomic_path(out / name) as part:
                part.write_bytes(content)
            done += len(shards[name])
            if progress is not None:
                progress("videos", done, source.count)
        written, skipped = _count_videos(source, out)
        table = Table(tokenizer, size, written, described, skipped)
        write_json(out / TABLE, asdict(table))
    return table


def _check_begun(out: Path, now: dict[str, object]) -> None:
    """Note what `out` is for. ValueError if it is for something else."""
    remove_parts(out)
    begun = out / "begun.json"
    if begun.exists():
        if read_json(begun) != now:
            raise ValueError(f"{out} holds codes of other videos or another tokenizer; choose another -o")
    elif any(out.iterdir()):
        raise ValueError(f"{out} holds something else already; choose another -o")
    else:
        write_json(begun, now)


def _count_videos(source: Videos, out: Path) -> tuple[int, dict[str, str]]:
    """How many videos the shards hold, and why others were skipped. ValueError if they hold none."""
    skipped = dict(source.skipped)
    written = 0
    for name in _shards(source.count):
        written += len(_read_index(out / name))
        skipped |= _skipped_in(out / name)
    if not written:
        reasons = "; ".join(f"{name}: {why}" for name, why in [*skipped.items()][:3])
        raise ValueError(f"none of the {source.count} videos can be used: {reasons}")
    return written, skipped


def _shards(count: int) -> dict[str, range]:
    """The numbers of the videos of each shard, by its file."""
    shards = {}
    for first in range(0, count, VIDEOS_A_SHARD):
        shards[f"{first // VIDEOS_A_SHARD:06d}.tar"] = range(first, min(first + VIDEOS_A_SHARD, count))
    return shards


def _encode_shard(source: Videos, encode: Encode, size: int, numbers: Sequence[int]) -> bytes:
    """The content of a shard."""
    skipped = {}
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for number in numbers:
            try:
                video = source[number]
                fps, codes = _encode_video(video, encode, size)
            except (ValueError, OSError) as error:
                skipped[source.name(number)] = str(error)
                continue
            stored = Stored(source.name(number), video.captions, fps)
            content = io.BytesIO()
            np.save(content, codes)
            _add(tar, f"{number:08d}.codes.npy", content.getvalue())
            _add(tar, f"{number:08d}.json", json.dumps(asdict(stored), ensure_ascii=False).encode())
        _add(tar, SKIPPED, json.dumps(skipped, ensure_ascii=False).encode())
    return shard.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _encode_video(video: CaptionedVideo, encode: Encode, size: int) -> tuple[float, Codes]:
    """The fps at which a video was read, and its codes."""
    for fps in RATES:
        if fps > 1.01 * video.fps and fps > RATES[-1]:
            continue
        count = int(video.seconds * fps + 0.5 * fps / video.fps) + 1
        times = np.minimum(np.arange(count) / fps, video.seconds)
        try:
            return fps, _encode_frames_at(times, video, encode, size)
        except TooFewFrames:
            if fps == RATES[-1]:
                raise
    raise AssertionError  # the lowest rate returns or raises


def _encode_frames_at(times: np.ndarray, video: CaptionedVideo, encode: Encode, size: int) -> Codes:
    """Codes of the frames at `times`, some at a time. TooFewFrames if one frame is nearest to two of them."""
    parts = []
    for first in range(0, len(times), TOGETHER):
        before = min(first, 1)  # is read once more, so that no frame is taken twice across this border
        frames = video.frames(times[first - before : first + TOGETHER], size)
        parts.append(encode(frames[before:]))
    return np.concatenate(parts)


@torch.inference_mode()
def encode_frames(vqvae: VQVAE, frames: Frames) -> Codes:
    """Frames [F, size, size, 3] to codes [F, N]."""
    device = next(vqvae.parameters()).device
    codes: Codes = vqvae.encode(to_images(frames).to(device)).cpu().numpy().astype(np.uint16)
    return codes


# -- reading


@dataclass(frozen=True)
class _Row:
    """Where a video's codes are in a shard."""

    shard: Path
    first: int  # byte
    size: int
    stored: Stored


def _read_index(shard: Path) -> list[_Row]:
    """The videos of a shard; ValueError if it is damaged."""
    rows = []
    places: dict[str, tuple[int, int]] = {}
    try:
        check_file(shard)
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if kind == "codes.npy":
                    places[key] = (member.offset_data, member.size)
                elif kind == "json":
                    file = tar.extractfile(member) if member.size <= MOST_BYTES else None
                    if file is None:
                        raise ValueError(f"{member.name!r} is too large, or no file")
                    stored = read_table(Stored, parse_json(file.read()))
                    rows.append(_Row(shard, *places[key], stored))
    except TAR_ERRORS as error:
        raise ValueError(f"cannot read the shard {shard}: {error or 'a header is damaged'}") from None
    return rows


def _skipped_in(shard: Path) -> dict[str, str]:
    with tarfile.open(shard, "r:") as tar:
        file = tar.extractfile(SKIPPED)
        found: dict[str, str] = json.loads(file.read()) if file is not None else {}
        return found


@dataclass(frozen=True)
class CodedClip:
    """A video of which only codes are stored."""

    codes_at_fps: Codes
    fps: float
    captions: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return (len(self.codes_at_fps) - 1) / self.fps

    def caption(self, rng: np.random.Generator) -> str:
        return choose_caption(self.captions, rng)

    def frames(self, times: Sequence[float] | np.ndarray, size: int) -> Frames:
        raise ValueError("of these videos only codes are stored; this phase needs their frames")

    def codes(self, times: Sequence[float] | np.ndarray) -> Codes:
        """Codes [F, N] of the frames nearest to `times` (seconds). TooFewFrames if one would be taken
        twice."""
        numbers = np.round(np.asarray(times) * self.fps).astype(int)
        if len(np.unique(numbers)) < len(numbers):
            raise TooFewFrames(f"there are {self.fps:g} frames a second")
        codes: Codes = self.codes_at_fps[np.clip(numbers, 0, len(self.codes_at_fps) - 1)]
        return codes


@dataclass(frozen=True)
class CodedVideos:
    """A `Source` of the videos of such a folder."""

    table: Table
    rows: tuple[_Row, ...]
    skipped: dict[str, str]

    @property
    def count(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows[index].stored.name

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return choose_caption(self.rows[index].stored.captions, rng)

    def __getitem__(self, index: int) -> CodedClip:
        """Raise ValueError, with the name of the shard, if it is damaged."""
        row = self.rows[index]
        try:
            with row.shard.open("rb") as file:
                file.seek(row.first)
                codes = np.load(io.BytesIO(file.read(row.size)), allow_pickle=False)
        except Exception as error:  # of a header in Python: TokenError, MemoryError ...
            raise ValueError(f"cannot read {row.shard}: {error or type(error).__name__}") from None
        if codes.dtype != np.uint16 or codes.ndim != 2 or not len(codes):
            raise ValueError(f"{row.shard}: {row.stored.name} has no codes [F, N] of 16 bits")
        return CodedClip(codes, row.stored.fps, row.stored.captions)


def is_coded(folder: str | Path) -> bool:
    return (Path(folder) / TABLE).is_file()


def open_coded(folder: Path) -> CodedVideos:
    """The videos of a folder that `cogvideo data tokenize` wrote. ValueError if it is damaged."""
    file = folder / TABLE
    try:
        table = read_table(Table, read_json(file))
    except ConfigError as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    rows = [row for shard in sorted(folder.glob("*.tar")) for row in _read_index(shard)]
    if len(rows) != table.videos:
        raise ValueError(
            f"{folder} has {len(rows)} videos, and {TABLE} says {table.videos}; a shard is missing"
        )
    return CodedVideos(table, tuple(rows), table.skipped)

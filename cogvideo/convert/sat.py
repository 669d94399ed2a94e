"""Read SAT checkpoint folders and the zips that contain them (docs/reference.md, "Checkpoint files").

Files are not trusted, and may be larger than memory:
- Torch's restricted unpickler reads a pickle, with `Ignored` in place of numpy's classes: no code of the file
  or of numpy runs. Tensors are memory-mapped, and read when they are used.
- Only a checkpoint's files are extracted from a zip, and none if it is a bomb or leads out of its folder.
"""

import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogvideo.convert.keys import States
from cogvideo.files import check_file, read_json

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WANTED = re.compile(r"(.*/)?(latest|model_config\.json|mp_rank_\d+_model_states\.pt)")
ESCAPES = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)")


class Ignored:
    """Replaces all numpy objects in a checkpoint (states of random generators); it stores nothing."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


NUMPY = (
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
)
IGNORED = [(Ignored, name) for name in NUMPY]


def read_states(file: Path) -> States:
    """The tensors under `module` of a pickled file. Raise ValueError if it is damaged or contains code."""
    if not file.exists():
        raise ValueError(f"{file} is missing")
    check_file(file)
    try:  # files that torch wrote before 2020 are not zips, and cannot be mapped
        entries = zipfile.ZipFile(file).infolist() if zipfile.is_zipfile(file) else []
        with warnings.catch_warnings(), torch.serialization.safe_globals(IGNORED):  # type: ignore[arg-type]
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", mmap=bool(entries), weights_only=True)
    except Exception as error:  # torch's messages are long and explain how to allow everything
        why = re.search(r"(?i)unsupported .*?(?=\. |\.?\n|$)", str(error)) or re.match(r"[^.\n]*", str(error))
        reason = why[0] if why else ""
        raise ValueError(f"{file} is refused, it is damaged or holds more than tensors: {reason}") from None

    states = loaded.get("module") if isinstance(loaded, dict) else None
    if not isinstance(states, dict) or not all(_is_plain(key, value) for key, value in states.items()):
        raise ValueError(f"{file} is not a checkpoint: what is under 'module' are not plain tensors")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # mapping it would give noise
        raise ValueError(f"{file} is refused: it is compressed inside, which torch never does")
    stored = sum(entry.file_size for entry in entries) or file.stat().st_size
    if sum(value.numel() * value.itemsize for value in states.values()) > stored:
        raise ValueError(f"{file} is refused: its tensors claim to be larger than what it holds")
    return states


def _is_plain(key: object, value: object) -> bool:
    """Whether this is the name of a dense tensor of floats on the CPU."""
    return (
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.dtype in FLOATS
        and value.device.type == "cpu"
    )


# -- SAT


class Checkpoint(NamedTuple):
    name: str
    described: dict[str, Any]  # model_config.json; empty if it is missing
    ranks: list[States]  # of every model-parallel rank


def find_checkpoints(sources: Sequence[Path]) -> list[Path]:
    """The checkpoint folders and zips among `sources`, and in folders among them."""
    checkpoints: list[Path] = []
    for source in sources:
        if not source.exists():
            raise ValueError(f"there is no {source}; give a checkpoint's folder or zip")
        if source.is_file() or (source / "latest").exists():
            inside = [source]
        else:
            inside = sorted([*source.glob("*.zip"), *(file.parent for file in source.glob("*/latest"))])
        if not inside:
            raise ValueError(f"{source} holds no SAT checkpoint: there is no file named latest")
        checkpoints += inside
    return checkpoints


@contextmanager
def open_checkpoint(source: Path, temporary: Path) -> Iterator[Checkpoint]:
    """Yield a checkpoint: a folder, or a zip, which is unpacked to the folder `temporary` meanwhile."""
    try:
        folder = source if source.is_dir() else _unpack(source, temporary)
        checkpoint = _read_checkpoint(source.name, folder)
    except ValueError as error:  # of an unpacked file, which is in the zip for whoever reads it
        raise ValueError(str(error).replace(f"{temporary}/", f"{source}: ")) from None
    yield checkpoint
    checkpoint.ranks.clear()  # the space of a mapped file would not be freed
    if folder is not source:
        shutil.rmtree(temporary)


def _read_checkpoint(name: str, folder: Path) -> Checkpoint:
    try:
        described = read_json(folder / "model_config.json")
    except FileNotFoundError:
        described = {}
    if not isinstance(described, dict):
        raise ValueError(f"{folder / 'model_config.json'} is damaged: it must be a table")
    files = _rank_files(folder, described.get("model_parallel_size", 1))
    return Checkpoint(name, described, [read_states(file) for file in files])


def _rank_files(folder: Path, count: int) -> list[Path]:
    """The files of all model-parallel ranks of the iteration that `latest` names."""
    check_file(folder / "latest")
    with (folder / "latest").open(errors="replace") as file:
        latest = file.read(99).strip()
    if latest != "release" and not (latest.isascii() and latest.isdecimal()):
        raise ValueError(f"{folder / 'latest'} says {latest!r}, where a number or 'release' belongs")
    files = sorted((folder / latest).glob("mp_rank_*_model_states.pt"))
    names = [file.name for file in files]
    expected = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(len(files))]
    if not files or count != len(files) or names != expected:
        raise ValueError(
            f"{folder / latest} is not complete: there should be {count} rank(s), by "
            f"model_config.json, but the files are: {', '.join(names) or 'none'}"
        )
    return files


@contextmanager
def _open_zip(source: Path) -> Iterator[zipfile.ZipFile]:
    """Yield a zip. Raise ValueError, with the file, for whatever zipfile raises meanwhile."""
    try:
        with zipfile.ZipFile(source) as archive:
            yield archive
    except (
        Exception
    ) as error:  # of its compressions: zlib.error, LZMAError, OSError of bzip2, MemoryError ...
        if isinstance(error, OSError) and error.errno:
            raise ValueError(f"cannot unpack {source}: {error.strerror}") from None
        raise ValueError(f"{source} is damaged or not a zip: {error or type(error).__name__}") from None


def _unpack(source: Path, target: Path) -> Path:
    """Unpack a zip to the folder `target`; return the folder of its only checkpoint."""
    with _open_zip(source) as archive:
        names = archive.namelist()
        entries = [entry for entry in archive.infolist() if WANTED.fullmatch(entry.filename)]
    escaping = next(filter(ESCAPES.match, names), None)
    if escaping:
        raise ValueError(f"{source} is refused: {escaping!r} leads out of the folder")
    packed = source.stat().st_size
    size = sum(entry.file_size for entry in entries)
    free = shutil.disk_usage(target.parent).free
    if size > 20 * packed + 1_000_000:  # weights hardly compress
        raise ValueError(f"{source} is refused as a zip bomb: its {packed} bytes would become {size}")
    if 2 * size > free:  # for the unpacked and for the converted files
        raise ValueError(f"{source} needs {2 * size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free")
    with _open_zip(source) as archive:
        archive.extractall(target, entries)

    roots = [file.parent for file in target.rglob("latest")]
    if len(roots) != 1:
        raise ValueError(f"{source} holds {len(roots)} SAT checkpoints, where one belongs")
    return roots[0]

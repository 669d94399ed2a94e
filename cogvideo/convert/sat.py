"""Read SAT checkpoint folders and the zips they come in (docs/reference.md, "Checkpoint files").

None of it is trusted, all of it may be larger than memory:
- A pickle is read by torch's restricted unpickler; numpy's names stand for `Ignored`: no code of the file or
  of numpy runs. Tensors are mapped, not read, and made when they are wanted.
- Of a zip only the files of a checkpoint are taken out, if it is neither a bomb nor leads out of its folder.
"""

import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogvideo.convert.keys import States

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WANTED = re.compile(r"(.*/)?(latest|model_config\.json|mp_rank_\d+_model_states\.pt)")
CLIMBS = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)")


class Ignored:
    """Stands for whatever of numpy is in a checkpoint (states of random generators). It keeps nothing."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


NUMPY = [f"{c}.multiarray.{f}" for c in ("numpy.core", "numpy._core") for f in ("_reconstruct", "scalar")]
IGNORED = [(Ignored, name) for name in (*NUMPY, "numpy.ndarray", "numpy.dtype", "_codecs.encode")]


def read_states(file: Path) -> States:
    """The tensors under `module` of a pickled file. Raises ValueError if it is damaged or runs code."""
    if not file.exists():
        raise ValueError(f"{file} is missing")
    try:  # what torch wrote before 2020 is no zip, and cannot be mapped
        entries = zipfile.ZipFile(file).infolist() if zipfile.is_zipfile(file) else []
        with torch.serialization.safe_globals(IGNORED):  # type: ignore[arg-type]
            loaded = torch.load(file, map_location="cpu", mmap=bool(entries), weights_only=True)
    except Exception as error:  # whatever the reader trips over; it says a lot, and how to allow all
        why = re.search(r"(?i)unsupported .*?(?=\. |\.?\n|$)", str(error)) or re.match(r"[^.\n]*", str(error))
        said = why[0] if why else ""
        raise ValueError(f"{file} is refused, it is damaged or holds more than tensors: {said}") from None
    states = loaded.get("module") if isinstance(loaded, dict) else None
    if not isinstance(states, dict) or not all(
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.dtype in FLOATS
        and value.device.type == "cpu"
        for key, value in states.items()
    ):
        raise ValueError(f"{file} is no checkpoint: what is under 'module' are not plain tensors")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # mapped, it would be noise
        raise ValueError(f"{file} is refused: it is compressed inside, which torch never does")
    held = sum(entry.file_size for entry in entries) or file.stat().st_size
    if sum(value.numel() * value.itemsize for value in states.values()) > held:
        raise ValueError(f"{file} is refused: its tensors claim to be larger than what it holds")
    return states


# -- SAT


class Checkpoint(NamedTuple):
    name: str
    described: dict[str, Any]  # model_config.json; empty if it is missing
    ranks: list[States]  # the states of every model-parallel rank


def find_checkpoints(sources: Sequence[Path]) -> list[Path]:
    """Checkpoint folders and zips, out of those and of folders of them."""
    found: list[Path] = []
    for source in sources:
        inside = sorted([*source.glob("*.zip"), *(file.parent for file in source.glob("*/latest"))])
        if source.is_file() or (source / "latest").exists():
            inside = [source]
        if not inside:
            raise ValueError(f"{source} holds no SAT checkpoint: there is no file named latest")
        found += inside
    return found


@contextmanager
def opened(source: Path, place: Path) -> Iterator[Checkpoint]:
    """A checkpoint folder, or the one in a zip, which is at `place` as long as it is open."""
    folder = source if source.is_dir() else _unpack(source, place)
    try:
        described = {**json.loads((folder / "model_config.json").read_bytes())}
    except FileNotFoundError:
        described = {}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / 'model_config.json'} is damaged: {error}") from None
    files = _rank_files(folder, described.get("model_parallel_size", 1))
    checkpoint = Checkpoint(source.name, described, [read_states(file) for file in files])
    yield checkpoint
    checkpoint.ranks.clear()  # a mapped file would stay on the disk
    if folder is not source:
        shutil.rmtree(place)


def _rank_files(folder: Path, count: int) -> list[Path]:
    """The files of all model-parallel ranks of the iteration that `latest` names."""
    latest = (folder / "latest").read_text(errors="replace").strip()
    if latest != "release" and not latest.isdecimal():
        raise ValueError(f"{folder / 'latest'} says {latest[:99]!r}, where a number or 'release' belongs")
    files = sorted((folder / latest).glob("mp_rank_*_model_states.pt"))
    found = [file.name for file in files]
    due = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(len(files))]
    if not files or count != len(files) or found != due:
        raise ValueError(
            f"{folder / latest} is not complete: there should be {count} rank(s), by "
            f"model_config.json, but the files are: {', '.join(found) or 'none'}"
        )
    return files


def _unpack(source: Path, place: Path) -> Path:
    """The folder of the one checkpoint of a zip, unpacked at `place`."""
    try:
        with zipfile.ZipFile(source) as archive:
            if climbing := next(filter(CLIMBS.match, archive.namelist()), None):
                raise ValueError(f"{source} is refused: {climbing!r} leads out of the folder")
            entries = [entry for entry in archive.infolist() if WANTED.fullmatch(entry.filename)]
            packed, size = source.stat().st_size, sum(entry.file_size for entry in entries)
            free = shutil.disk_usage(place.parent).free
            if size > 20 * packed + 1_000_000:  # weights hardly shrink
                raise ValueError(f"{source} is refused as a zip bomb: its {packed} bytes would become {size}")
            if 2 * size > free:  # as it is, and converted
                raise ValueError(f"{source} needs {2 * size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free")
            archive.extractall(place, entries)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise ValueError(f"{source} is damaged or no zip: {error}") from None
    roots = [file.parent for file in place.rglob("latest")]
    if len(roots) != 1:
        raise ValueError(f"{source} holds {len(roots)} SAT checkpoints, where one belongs")
    return roots[0]

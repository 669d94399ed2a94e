"""Write files and folders completely or not at all: under a temporary name, renamed at the end."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, for a file or folder; rename it to `path` on success.

    On failure the temporary path is removed; one left by a killed process is removed by the next call.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".part-{path.name}")
    _remove(work)
    try:
        yield work
        os.replace(work, path)
    finally:
        _remove(work)


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON; NaN and infinity, which JSON does not know, become null."""
    text = json.dumps(_without_nan(value), indent=2, ensure_ascii=False)
    with atomic_path(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder by name."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    sha = hashlib.sha256()
    for file in files:
        if path.is_dir():
            sha.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; on success move its files to `path`, config.json last.

    Files of the same name in `path` are replaced, the others stay. On failure the temporary folder is
    removed; one left by a killed process is removed by the next call.
    """
    path = path.expanduser().resolve()
    work = path.with_name(f".{path.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work
        if not path.exists() or not any(path.iterdir()):
            os.replace(work, path)
        else:
            for file in sorted(work.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, path / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)

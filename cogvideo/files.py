"""Files and folders that are written whole or not at all: beside their place, and renamed at the end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file or folder to, beside `path`; it becomes `path` when all went well. What is left
    when not, also by a killed process, is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".part-{path.name}")
    _remove(work)
    try:
        yield work
        os.replace(work, path)
    finally:
        _remove(work)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, beside `path`. When all went well its files go there, over what had their names,
    config.json last; when not, they are removed, as is what a killed process left."""
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

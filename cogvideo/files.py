"""Read files of users with errors that name them; write files and folders completely or not at all, under a
temporary name that is renamed at the end; hold a folder that only one process may write into."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

# what tarfile raises for damaged headers, and for sizes that no memory holds
TAR_ERRORS = (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError, MemoryError)
# what numpy and torch raise for damaged archives
DAMAGE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    MemoryError,
    UnpicklingError,
    BadZipFile,
    zlib.error,
)
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ESTALE,
}
DIGITS = 300  # of a whole number; one with more is beyond a float
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# The name of what is being written: the machine and the process that write it, and what it will be called.
PREFIX = r"\.part-([0-9a-f]{6})-(\d+)-[0-9a-f]{4}-"
PART = re.compile(f"{PREFIX}(.+)", re.DOTALL)


def check_file(path: Path) -> None:
    """Raise ValueError for a folder, and for a device or pipe, which may never end. FileNotFoundError if
    there is nothing."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
        raise ValueError(f"cannot read {path}: it is {kind}; give a file")


def read_text(path: Path) -> str:
    """A text in UTF-8. Raise ValueError, with the file, if it is something else; FileNotFoundError if there
    is none."""
    check_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"cannot read {path}: it is not text in UTF-8") from None


def read_json(path: Path, any_number: bool = False) -> Any:
    """What a file of JSON holds. Raise ValueError, with the file, if it is damaged; FileNotFoundError if
    there is none. `any_number`: as for `parse_json`."""
    text = read_text(path)
    try:
        return parse_json(text, any_number)
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def parse_json(text: str | bytes, any_number: bool = False) -> Any:
    """What a text of JSON means. Raise ValueError for all that is not JSON in UTF-8: NaN, halves of
    characters, numbers beyond a float, endless nesting. `any_number`: leave it to the caller to refuse NaN,
    by the key that it stands at."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        constant = float if any_number else _refuse_constant
        value = json.loads(
            text, parse_constant=constant, parse_int=_parse_int, object_pairs_hook=_table_of_pairs
        )
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("it is not JSON (a string has half of a character)") from None
    except RecursionError:
        raise ValueError("it is not JSON (it is nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _table_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:60]!r} is there twice")
    return table


def _parse_int(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; {DIGITS} are possible")
    return int(digits)


def expand_user(path: str | Path) -> Path:
    """A path whose ~ is the home of a user; that of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`, for a file or folder; rename it to `path` on success.

    On failure the temporary path is removed; one left by a killed process is removed by the next call.
    Several processes may write the same path: the last one counts. What is not `durable` may be lost when
    the power fails; that is faster for what can be computed again.
    """
    with _part_of(path) as part:
        yield part
        if durable:
            _flush(part)
        os.replace(part, path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder next to `path`; on success move its files to `path`, config.json last.

    Files of the same name in `path` are replaced, the others stay. Failures end as in `atomic_path`.
    """
    path = expand_user(path).resolve()
    with _part_of(path) as part:
        part.mkdir()
        yield part
        _flush(part)
        if not path.exists() or not any(path.iterdir()):
            os.replace(part, path)
        else:
            for file in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, path / file.name)


@contextmanager
def _part_of(path: Path) -> Iterator[Path]:
    """Yield a path next to `path` for what is not finished; remove what is there at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path.parent, path.name)
    part = path.with_name(f".part-{_machine()}-{os.getpid()}-{secrets.token_hex(2)}-{path.name}")
    try:
        with writing(path):
            yield part
    finally:
        with suppress(OSError):  # of a disk that is read-only now; the error that told so counts
            _remove(part)


def _flush(path: Path) -> None:
    """Wait until a file, or the files of a folder, are on the disk. OSError if they do not get there."""
    files = path.rglob("*") if path.is_dir() else [path]
    for file in files:
        if os.name == "nt" or not file.is_file():  # Windows flushes no file that is open for reading
            continue
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Give an error of the disk, which names no file or a temporary one, the name of what is written."""
    try:
        yield
    except OSError as error:
        named = str(error.filename or "")
        ours = named in ("", str(path)) or ".part-" in named
        if error.errno not in DISK_ERRORS or not ours:
            raise
        raise OSError(f"cannot write {re.sub(PREFIX, '', str(path))}: {error.strerror}") from None


def remove_parts(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes of this machine left unfinished in a folder: all of it, or what would
    have become `name`."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(".part-")]
    for left in names:
        match = PART.fullmatch(left)
        if match is None or match[1] != _machine() or name not in (None, match[3]):
            continue
        if not _is_alive(int(match[2])):
            _remove(folder / left)


def _machine() -> str:
    """Six digits that tell machines, and containers, that share a folder."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder, made where there is none, so that no other process that asks may write into it. It is
    free again when this process ends, for whatever reason.

    ValueError, with the process that holds it, if one does, and if it is a file. Where the file system or
    the platform has no locks, nothing is held.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    made = not folder.exists()
    if not made and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another name for the folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.fstat(held).st_ino)
            raise ValueError(
                f"{holder} is writing into {folder}; wait until it ends, or choose another folder"
            ) from None
        except OSError:  # the file system has no locks
            pass
        yield
    finally:
        os.close(held)
        if made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _holder(inode: int) -> str:
    """The process that locks a file, if the kernel tells."""
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            match = re.search(rf" FLOCK .* WRITE (\d+) \S+:{inode} ", line)
            if match is not None and int(match[1]):
                return f"process {match[1]}"
    return "another process"


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

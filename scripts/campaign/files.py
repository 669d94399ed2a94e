"""A campaign of damaged files: what the package reads must end in one line that names the file.

    python -m scripts.campaign.files --cases 10000 --seed 0 [--kinds image,tar] [--out failures]
    python -m scripts.campaign.files --replay failures/image-17

Every case is a copy of a good example with one of its files damaged (`damage.py`), which the package's own
reader reads (`corpus.py`) in a child process with little memory and time. What must not happen is a flag:

    traceback   an exception that the command line does not turn into one line
    unnamed     an error that names none of the files
    hang        more than SECONDS; crash: the process died
    memory      more than MEMORY
    code        code of the file ran: it leaves a file "canary"
    outside     a file was written elsewhere than to the output, or an input was changed
    noise       something was printed, or a warning shown

The same seed gives the same cases. Flagged cases are stored with their files, to be replayed.
"""

import argparse
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import torch

from scripts.campaign.children import run_cases, status
from scripts.campaign.corpus import KINDS, Kind
from scripts.campaign.damage import EVIL, Content, damage

SECONDS = 30.0  # of a case
STARTING = 60.0  # more for the first of a process
MEMORY = 3 * 2**30  # bytes that a case may take
Files = dict[str, Content]  # by their names in the folder of a case


def make_case(examples: Path, kind: Kind, random: Random) -> tuple[Files, str]:
    """The files of a damaged example, and the name of the one that is damaged."""
    example = random.choice(sorted(folder for folder in examples.iterdir()))
    files: Files = {}
    for file in sorted(file for file in example.rglob("*") if file.is_file()):
        files[str(file.relative_to(example))] = file.read_bytes()
    harmed = [name for pattern in kind.harmed for name in sorted(files) if Path(name).match(pattern)]
    name = random.choice(harmed)
    others = [other for other in files.values() if isinstance(other, bytes)]
    content = files[name]
    assert isinstance(content, bytes)
    files[name] = damage(name, content, others, random)
    return files, name


def write_case(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "pipe":
            os.mkfifo(path)
        elif content == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()


def run_case(kind: Kind, files: Files, root: Path) -> tuple[list[str], str]:
    """The flags of a case, and its error. It is read in `root`/in, with `root`/cwd as working directory."""
    for name in ("in", "out", "cwd", "tmp"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir(parents=True)
    write_case(root / "in", files)
    os.chdir(root / "cwd")
    before = _listing(root)
    flags = []
    error: BaseException | None = None
    try:
        kind.read(root / "in", root / "out")
    except (ValueError, OSError) as caught:
        error = caught
        names = {
            *files,
            *(Path(name).name for name in files),
            str(root / "in"),
            "in: ",
            "in is ",
            "in cannot ",
            "/world-",
        }
        if kind.named and not any(name in str(caught) for name in names):
            flags.append("unnamed")
    except MemoryError as caught:
        error = caught
        flags.append("memory")
    except Exception as caught:
        error = caught
        flags.append("traceback")
    if (root / "cwd" / "canary").exists():
        flags.append("code")
    text = "" if error is None else "".join(traceback.format_exception(error))
    changed = _listing(root) ^ before
    if changed or os.path.exists(EVIL):
        flags.append("outside")
        text += f"\nchanged: {', '.join(sorted(changed))}"
    return flags, text


def _listing(root: Path) -> set[str]:
    """All that is not output."""
    kept = (root / "out", root / "server", root / "stderr")
    files = (path for path in root.rglob("*") if not any(path.is_relative_to(place) for place in kept))
    return {f"{path} {path.lstat().st_size if path.is_file() else ''}" for path in files}


# -- processes


def _work(name: str, examples: Path, seed: int, root: Path, numbers: list[int], pipe: Connection) -> None:
    """Run some cases, and report each."""
    errors = os.open(root / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    logging.disable()  # what a server logs is for whoever runs it
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(root / "server")
    os.environ["TMPDIR"] = tempfile.tempdir = str(root / "tmp")
    limit = status("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("always")
    kind = KINDS[name]
    for number in numbers:
        files, _ = make_case(examples, kind, Random(f"{seed} {name} {number}"))
        os.ftruncate(errors, 0)
        held = status("VmHWM")
        flags, error = run_case(kind, files, root)
        if status("VmHWM") - held > MEMORY / 2:
            flags.append("memory")
        sys.stderr.flush()
        said = (root / "stderr").read_bytes()
        if said.strip(b"\0"):
            flags.append("noise")
            error += said.decode(errors="replace")
        pipe.send((flags, error))


def run_kind(name: str, examples: Path, seed: int, count: int, root: Path, out: Path) -> Counter[str]:
    """Run the cases of a kind; the flags, and how often they came. Flagged cases are stored in `out`."""

    def store(number: int, flags: list[str], error: str) -> None:
        files, harmed = make_case(examples, KINDS[name], Random(f"{seed} {name} {number}"))
        _store(out / f"{name}-{number}", name, files, harmed, flags, error)

    return run_cases(count, partial(_work, name, examples, seed, root), store, SECONDS, STARTING)


def _store(folder: Path, kind: str, files: Files, harmed: str, flags: list[str], error: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    write_case(folder / "in", files)
    places = {name: content for name, content in files.items() if isinstance(content, str)}
    row = {"kind": kind, "harmed": harmed, "flags": flags, "places": places, "error": error[-5000:]}
    (folder / "case.json").write_text(json.dumps(row, indent=2))


def replay(folder: Path) -> list[str]:
    """Run a stored case in this process, and print what happens."""
    row: dict[str, Any] = json.loads((folder / "case.json").read_text())
    files: Files = dict(row["places"])
    for file in sorted((folder / "in").rglob("*")):
        name = str(file.relative_to(folder / "in"))
        if name not in files and file.is_file():
            files[name] = file.read_bytes()
    with tempfile.TemporaryDirectory() as root:
        flags, error = run_case(KINDS[row["kind"]], files, Path(root))
        os.chdir("/")
    print(f"{row['kind']}, {row['harmed']} is damaged: {', '.join(flags) or 'no flag'}\n{error}")
    return flags


def campaign(kinds: list[str], cases: int, seed: int, out: Path) -> dict[str, Counter[str]]:
    """The flags of every kind, printed as a table."""
    torch.set_num_threads(1)
    out = out.absolute()
    here = Path.cwd()
    found = {}
    print(f"{'kind':<12} {'cases':>6} {'seconds':>8}  flags", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for i, name in enumerate(kinds):
            count = cases // len(kinds) + (i < cases % len(kinds))
            began = time.monotonic()
            examples = Path(work, "examples", name)
            examples.mkdir(parents=True)
            KINDS[name].write(examples)
            root = Path(work, "root", name)
            root.mkdir(parents=True)
            found[name] = run_kind(name, examples, seed, count, root, out)
            flags = ", ".join(f"{flag} {times}" for flag, times in found[name].items()) or "none"
            print(f"{name:<12} {count:>6} {time.monotonic() - began:>8.0f}  {flags}", flush=True)
    os.chdir(here)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("failures"), help="for the flagged cases")
    parser.add_argument("--replay", type=Path, help="the folder of a flagged case")
    options = parser.parse_args()
    if options.replay is not None:
        return int(bool(replay(options.replay)))
    kinds = options.kinds.split(",")
    unknown = set(kinds) - KINDS.keys()
    if unknown:
        parser.error(f"unknown kind {unknown.pop()}; choose from {', '.join(KINDS)}")
    found = campaign(kinds, options.cases, options.seed, options.out)
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())

"""A campaign of bad input to the command line: options, environment, prompts, and the files of model folders.

    python -m scripts.campaign.inputs --cases 10000 --seed 0 [--kinds option,config] [--out failures]
    python -m scripts.campaign.inputs --replay failures/option-17

Every case is a command that works, with something bad in it (`lines.py`), or with a damaged model
(`models.py`). `cogvideo.cli.main` runs it in a child process with little memory and time; where training or
serving would begin, it ends. What must not happen is a flag:

    traceback   an exception that `main` does not turn into one line
    exit        another exit code than 0 and 2
    lines       an error of several lines, or of more than 1,000 characters
    unnamed     an error that names neither the option, the key nor the file
    accepted    what cannot be meant, such as nan, was taken
    hang        more than SECONDS; crash: the process died
    memory      more than MEMORY
    outside     a file was written elsewhere than to the output, or an input was changed
    code        code of a file ran: it leaves a file "canary"
    noise       warnings, or anything else on stderr, of a command that worked

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

import torch

from cogvideo import cli
from scripts.campaign import lines, models
from scripts.campaign.case import Case
from scripts.campaign.children import run_cases, status
from scripts.campaign.ground import BEGUN, ENVIRONMENT, Begun, build_ground, lay_ground, stop_before_work

SECONDS = 20.0  # of a case
STARTING = 40.0  # more for the first of a process
MEMORY = 2 * 2**30  # bytes that a case may take
LONGEST = 1000  # characters of an error
KINDS = lines.KINDS | models.KINDS


def make_case(ground: Path, kind: str, seed: int, number: int) -> Case:
    return KINDS[kind](ground, Random(f"{seed} {kind} {number}"))


# -- one case


def run_case(case: Case, ground: Path, root: Path) -> tuple[list[str], str]:
    """The flags of a case, and what it printed. It runs in `root`/cwd."""
    lay_ground(ground, root, case)
    os.chdir(root / "cwd")
    before = _listing(ground, root, case)
    os.environ.clear()
    os.environ.update(
        ENVIRONMENT | {"HOME": str(root / "home"), "TMPDIR": str(root / "tmp")} | case.environment
    )
    sys.argv = ["cogvideo", *case.arguments]
    code, error = _call()
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    said, complaint = ((root / name).read_bytes().decode(errors="replace") for name in ("stdout", "stderr"))
    flags = _judge(case, code, error, complaint)
    if (root / "cwd" / "canary").exists():
        flags.append("code")
    changed = _listing(ground, root, case) ^ before
    if changed:
        flags.append("outside")
        complaint += f"\nchanged: {', '.join(sorted(changed))}"
    return flags, f"exit {code}\n{said[:2000]}\n{complaint[:4000]}\n{error}"


def _call() -> tuple[object, str]:
    """The exit code of `main`, and a traceback."""
    try:
        cli.main()
    except SystemExit as exit:
        return exit.code or 0, ""
    except Begun:
        return BEGUN, ""
    except MemoryError:
        return "memory", traceback.format_exc()
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0, ""


def _judge(case: Case, code: object, error: str, complaint: str) -> list[str]:
    """The flags of what a command left: its exit code, its exception, and what it wrote to stderr."""
    if error or "Traceback" in complaint:
        return [str(code) if error else "traceback"]
    flags = []
    told = [line for line in complaint.splitlines() if not line.startswith("hint: ")]
    if code not in (0, BEGUN, 2):
        return ["exit"]
    if code != 2:
        if case.wrong:
            flags.append("accepted")
        if told:
            flags.append("noise")
        return flags
    table = case.arguments[0] == "generate" and "--ignore-memory tries nevertheless" in complaint
    last = told[-1] if told else ""
    if not last.startswith("cogvideo: ") or len(last) > LONGEST or (len(told) > 1 and not table):
        flags.append("lines")
    if case.names and not any(name in last for name in case.names):
        flags.append("unnamed")
    return flags


def _listing(ground: Path, root: Path, case: Case) -> set[str]:
    """All that is not output, with sizes and times."""
    kept = [root / name for name in ("out", "stdout", "stderr", "tmp")]
    if case.writes_elsewhere:
        kept.append(root / "cwd")
    places = [*ground.rglob("*"), *root.rglob("*")]
    files = (path for path in places if not any(path.is_relative_to(place) for place in kept))
    found = set()
    for path in files:
        stat = path.lstat()
        found.add(f"{path} {stat.st_size} {stat.st_mtime_ns}" if path.is_file() else str(path))
    return found


# -- processes


def _work(ground: Path, kind: str, seed: int, root: Path, numbers: list[int], pipe: Connection) -> None:
    """Run some cases, and report each."""
    said, errors = (
        os.open(root / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for name in ("stdout", "stderr")
    )
    os.dup2(said, 1)
    os.dup2(errors, 2)
    sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    stop_before_work(ground)
    logging.disable()
    limit = status("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**29, 2**29))
    tempfile.tempdir = str(root / "tmp")
    for number in numbers:
        case = make_case(ground, kind, seed, number)
        for stream in (said, errors):
            os.ftruncate(stream, 0)
            os.lseek(stream, 0, os.SEEK_SET)
        warnings.resetwarnings()
        held = status("VmHWM")
        flags, told = run_case(case, ground, root)
        if status("VmHWM") - held > MEMORY / 2 and "memory" not in flags:
            flags.append("memory")
        pipe.send((flags, told))


def run_kind(ground: Path, kind: str, seed: int, count: int, root: Path, out: Path) -> Counter[str]:
    """Run the cases of a kind; the flags, and how often they came. Flagged cases are stored in `out`."""

    def store(number: int, flags: list[str], told: str) -> None:
        _store(out / f"{kind}-{number}", make_case(ground, kind, seed, number), flags, told)

    return run_cases(count, partial(_work, ground, kind, seed, root), store, SECONDS, STARTING)


def _store(folder: Path, case: Case, flags: list[str], told: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row = {"flags": flags, "case": case.to_dict(), "told": told}
    (folder / "case.json").write_text(json.dumps(row, indent=2))


def replay(folder: Path) -> list[str]:
    """Run a stored case in this process, and print what happens."""
    row = json.loads((folder / "case.json").read_text())
    case = Case.from_dict(row["case"])
    with tempfile.TemporaryDirectory() as work:
        ground = build_ground(Path(work, "ground"))
        stop_before_work(ground)
        root = Path(work, "root")
        root.mkdir()
        print(" ".join(map(ascii, case.arguments)), flush=True)
        streams = [os.dup(1), os.dup(2)]
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(root / name, os.O_RDWR | os.O_CREAT), number)
        flags, told = run_case(case, ground, root)
        for number, stream in ((1, streams[0]), (2, streams[1])):
            os.dup2(stream, number)
        os.chdir("/")
    print(f"{', '.join(flags) or 'no flag'}\n{told}")
    return flags


def campaign(kinds: list[str], cases: int, seed: int, out: Path) -> dict[str, Counter[str]]:
    """The flags of every kind, printed as a table."""
    torch.set_num_threads(1)
    out = out.absolute()
    found = {}
    print(f"{'kind':<12} {'cases':>6} {'seconds':>8}  flags", flush=True)
    with tempfile.TemporaryDirectory() as work:
        ground = build_ground(Path(work, "ground"))
        for i, kind in enumerate(kinds):
            count = cases // len(kinds) + (i < cases % len(kinds))
            began = time.monotonic()
            root = Path(work, "root", kind)
            root.mkdir(parents=True)
            found[kind] = run_kind(ground, kind, seed, count, root, out)
            flags = ", ".join(f"{flag} {times}" for flag, times in found[kind].items()) or "none"
            print(f"{kind:<12} {count:>6} {time.monotonic() - began:>8.0f}  {flags}", flush=True)
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

"""A campaign against loss: commands are killed, stopped, and lose their disk; then they are run again.

    python -m scripts.campaign.loss --cases 300 --seed 0 [--works train] [--harms kill] [--out failures]

Each case takes one of `WORKS`, does one of `HARMS` to it, and repeats the command undisturbed. The models
are small (stand_ins.py), the processes and files are real. What must not happen is a flag:

    traceback   an exception reached the user
    lines       the last line does not say what happened, or there are several
    exit        another exit code than that of the signal, or 2 for an error
    hang        no end after LIMIT seconds
    orphan      a process outlived its parent
    half        a file has its final name and cannot be read
    part        a temporary file is left, by a signal or after the repetition
    lost        a file that was finished was written again
    different   the result is another than that of an undisturbed run
    again       the repeated command fails

The same seed gives the same cases, but not the same moments of time.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import IO

import numpy as np
from PIL import Image
from safetensors import safe_open

from cogvideo.video import Clip
from scripts.stand_ins import ROOT, shrink

LIMIT = 180.0  # seconds for a command
HANGS = 1000  # in place of an exit code
CHANGES = re.compile(r"\d+ changes")  # the last line of dying.py
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MORE = {"data/coded.py": "VIDEOS_A_SHARD = 1"}  # to the copy of the package


@dataclass(frozen=True)
class Work:
    """A command that writes into out/, and which of the files there it must not write twice."""

    command: str
    kept: str = ""  # a pattern
    ignored: tuple[str, ...] = ()  # names of files that tell times
    random: bool = False  # whether names are random, and what is complete is not written again


TRAIN = "--save-every 1 --probe-every 1 --log-every 1 --threads 1"
TIMES = (".metadata", "log.jsonl", "loss.png", "report.json", "report.html")
WORKS = {
    "generate": Work(
        "generate cat --num-videos 2 --num-frames 9 --model models/tiny --seed 1 --keep out/keep -o out/a.mp4"
    ),
    "image": Work("generate cat --num-frames 1 --model models/tiny --seed 1 -o out/cat.png"),
    "train": Work(f"train tiny --data my_videos --out out/run --processes 1 {TRAIN}", ignored=TIMES),
    "train2": Work(f"train tiny --data my_videos --out out/run --processes 2 {TRAIN}", ignored=TIMES),
    "shards": Work(
        f"train tiny --phases tokenizer image --out out/run --shard --processes 2 {TRAIN}", ignored=TIMES
    ),
    "direct": Work(f"train direct-tiny --out out/run --processes 1 {TRAIN}", ignored=TIMES),
    "lora": Work(
        f"train tiny --init models/tiny --data my_videos --lora 4 --out out/run --processes 1 {TRAIN}",
        ignored=TIMES,
    ),
    "tokenize": Work("data tokenize my_videos --model models/tiny -o out/shards", kept="*.tar"),
    "convert": Work(
        "convert sat cogvideo-stage1.zip cogvideo-stage2.zip out/converted",
        kept="converted/stage1.safetensors",
    ),
    "evaluate": Work(
        "evaluate generated reference -o out/report.json --few --preset tinyworld --frames 5 --fps 1 "
        "--no-controls --cache out/cache",
        kept="*.npz",
        ignored=TIMES,
    ),
    "world": Work("data world my_art -o out/world --held-out 4 --judge-steps 2"),
    "judge": Work(
        "judge new out/study --systems generated reference --prompts captions.txt "
        "--frames 5 --fps 2 --size 32",
        random=True,
    ),
}


def usual_signals() -> None:
    """Let signals end this process, even where its parent ignores them, as in the background of a shell."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


class Stage:
    """The folder in which commands run: what a user would bring, and an empty out/ for each run."""

    def __init__(self, folder: Path):
        self.cwd = folder / "cwd"
        package = folder / "package"
        shrink(ROOT / "cogvideo", package / "cogvideo", "nano")
        for file, lines in MORE.items():
            with (package / "cogvideo" / file).open("a") as stream:
                stream.write(f"\n\n{lines}\n")
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{package}{os.pathsep}{ROOT}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
        }
        for what, where in (("files", self.cwd), ("models", self.cwd / "models")):
            command = [sys.executable, "-m", "scripts.stand_ins", what, str(where)]
            subprocess.run(command, env=self.environment, cwd=ROOT, check=True, capture_output=True)

    @property
    def out(self) -> Path:
        return self.cwd / "out"

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()

    def start(self, work: Work, last: int = 0) -> "Running":
        """The command of a work, to be killed before change number `last` of the file system."""
        return self.run([sys.executable, "-m", "scripts.campaign.dying", str(last), *work.command.split()])

    def run(self, command: list[str]) -> "Running":
        """A process in a session of its own."""
        errors = tempfile.TemporaryFile()  # noqa: SIM115  a pipe would wait for orphans
        process = subprocess.Popen(
            command,
            cwd=self.cwd,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            preexec_fn=usual_signals,
        )
        return Running(process, errors)


@dataclass(frozen=True)
class Told:
    """How a process ended."""

    code: int
    lines: list[str]  # of stderr
    changes: int = 0  # of the file system

    @property
    def last(self) -> str:
        return self.lines[-1] if self.lines else ""


@dataclass(frozen=True)
class Running:
    """A command that is running."""

    process: subprocess.Popen[bytes]
    errors: IO[bytes]  # what it writes to stderr

    def send(self, number: int, everyone: bool = False) -> None:
        """Send a signal to it, or to all processes of its session, if it still runs."""
        with suppress(ProcessLookupError):
            if everyone:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    def wait(self) -> Told:
        """Wait for its end; the code of one that hangs is HANGS."""
        try:
            code = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL, everyone=True)
            code = HANGS
        with self.errors as file:
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
        counted = [line for line in lines if CHANGES.fullmatch(line)]
        return Told(
            code,
            [line for line in lines if line not in counted],
            int(counted[-1].split()[0]) if counted else 0,
        )


# -- what a run left


def digests(out: Path) -> dict[str, str]:
    """Every file below a folder, and what it contains."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): sha256(_content(path)).hexdigest() for path in files}


def _content(path: Path) -> bytes:
    """The bytes of a file; of safetensors, which write texts about them in random order, in a fixed one."""
    data = path.read_bytes()
    if path.suffix != ".safetensors" or not is_whole(path):
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]


def _read_tar(path: Path) -> None:
    with tarfile.open(path) as tar:
        tar.getmembers()


def is_whole(path: Path) -> bool:
    """Whether a file can be read to its end."""
    readers: dict[str, Callable[[Path], object]] = {
        ".json": lambda path: json.loads(path.read_text()),
        ".mp4": Clip.load,
        ".png": lambda path: Image.open(path).load(),
        ".npz": lambda path: [*np.load(path).values()],
        ".tar": _read_tar,
        ".pt": lambda path: zipfile.ZipFile(path).testzip(),
        ".safetensors": lambda path: safe_open(path, "pt").keys(),
    }
    reader = readers.get(path.suffix)
    if reader is None:
        return True
    try:
        reader(path)
    except Exception:
        return False
    return True


def parts(out: Path) -> list[str]:
    return [str(path.relative_to(out)) for path in out.rglob("*") if path.name.startswith(".part-")]


def marks(out: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """The files of a pattern, and when each was written."""
    files = out.rglob(pattern) if pattern else iter(())
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files if is_whole(file)}


# -- harms: each starts the work, disturbs it, and returns the flags


def judge_error(told: Told) -> list[str]:
    """The flags of a command that met an error: one line, exit code 2."""
    if told.code == HANGS:
        return ["hang"]
    if any("Traceback" in line for line in told.lines):
        return ["traceback"]
    flags = []
    if told.code != 2:
        flags.append("exit")
    spoken = [line for line in told.lines if not line.startswith(("hint: ", "process "))]
    if len(spoken) != 1 or not spoken[0].startswith("cogvideo: "):
        flags.append("lines")
    return flags


def kill(stage: Stage, work: Work, usual: "Usual", random: Random) -> tuple[list[str], str]:
    """SIGKILL, at a random moment or before a random change of the file system."""
    if random.random() < 0.6:
        number = random.randint(1, usual.changes)
        running = stage.start(work, number)
        moment = f"before change {number} of {usual.changes}"
    else:
        seconds = random.uniform(0, usual.seconds)
        running = stage.start(work)
        time.sleep(seconds)
        running.send(signal.SIGKILL)
        moment = f"after {seconds:.2f} s"
    told = running.wait()
    return (["hang"] if told.code == HANGS else []), moment


def stop(stage: Stage, work: Work, usual: "Usual", random: Random) -> tuple[list[str], str]:
    """SIGINT, SIGTERM or SIGHUP at a random moment, to the process or, as a terminal does, to all."""
    number = random.choice(SIGNALS)
    everyone = number == signal.SIGINT and random.random() < 0.5
    seconds = random.uniform(0.2, usual.seconds)
    running = stage.start(work)
    time.sleep(seconds)
    running.send(number, everyone)
    told = running.wait()
    moment = f"{number.name} after {seconds:.2f} s: exit {told.code}, {told.last}"
    if told.code == 0:  # it had ended already
        return [], moment
    if told.code == HANGS:
        return ["hang"], moment
    flags = []
    if any("Traceback" in line for line in told.lines):
        flags.append("traceback")
    if told.code != 128 + number:
        flags.append("exit")
    if not told.last.startswith(f"cogvideo: stopped by {number.name}"):
        flags.append("lines")
    if parts(stage.out):
        flags.append("part")
    return flags, moment


def full(stage: Stage, work: Work, usual: "Usual", random: Random) -> tuple[list[str], str]:
    """A disk that is full after a random number of bytes."""
    room = random.randint(1, max(usual.room // 4096, 2)) * 4096
    with _disk(stage, f"size={room}"):
        told = stage.start(work).wait()
        moment = f"{room} of {usual.room} bytes: exit {told.code}, {told.last}"
        flags = [] if told.code == 0 else judge_error(told)
        _keep(stage)
    return flags, moment


def read_only(stage: Stage, work: Work, usual: "Usual", random: Random) -> tuple[list[str], str]:
    """A disk that nobody may write to any more, from a random moment on."""
    seconds = random.uniform(0, usual.seconds)
    with _disk(stage, "size=1g"):
        running = stage.start(work)
        time.sleep(seconds)
        # the mount itself, or a file that is just being written would forbid it
        subprocess.run(["mount", "-o", "remount,bind,ro", stage.out], check=True)
        told = running.wait()
        moment = f"after {seconds:.2f} s: exit {told.code}, {told.last}"
        flags = [] if told.code == 0 else judge_error(told)
        subprocess.run(["mount", "-o", "remount,bind,rw", stage.out], check=True)
        _keep(stage)
    return flags, moment


def vanish(stage: Stage, work: Work, usual: "Usual", random: Random) -> tuple[list[str], str]:
    """The folder of the output is gone at a random moment."""
    seconds = random.uniform(0, usual.seconds)
    running = stage.start(work)
    time.sleep(seconds)
    gone = stage.cwd / "gone"
    stage.out.rename(gone)
    told = running.wait()
    shutil.rmtree(gone)
    stage.out.mkdir(exist_ok=True)
    moment = f"after {seconds:.2f} s: exit {told.code}, {told.last}"
    return ([] if told.code == 0 else judge_error(told)), moment


def twice(stage: Stage, work: Work, usual: "Usual", random: Random) -> tuple[list[str], str]:
    """Two processes with the same output."""
    first = stage.start(work)
    seconds = random.uniform(0, usual.seconds)
    time.sleep(seconds)
    second = stage.start(work)
    both = [first.wait(), second.wait()]
    moment = f"{seconds:.2f} s apart: {'; '.join(f'exit {told.code}, {told.last}' for told in both)}"
    flags = []
    for told in both:
        if told.code:
            flags += judge_error(told)
            if not any(reason in told.last for reason in REFUSALS):
                flags.append("lines")
    if all(told.code for told in both):
        flags.append("exit")
    return flags, moment


REFUSALS = ("is writing into", "exists; choose another folder")  # of a second process
HARMS = {"kill": kill, "stop": stop, "full": full, "read-only": read_only, "vanish": vanish, "twice": twice}
MOUNTS = {"full", "read-only"}  # which need the right to mount


@contextmanager
def _disk(stage: Stage, options: str) -> Iterator[None]:
    """out/ as a file system of its own."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", stage.out], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", stage.out], check=True)
        kept = stage.cwd / "kept"
        if kept.exists():
            shutil.rmtree(stage.out)
            kept.rename(stage.out)


def _keep(stage: Stage) -> None:
    """Save what is on the small disk: the work is repeated on a large one."""
    shutil.copytree(stage.out, stage.cwd / "kept", symlinks=True)


def can_mount() -> bool:
    """Whether this process may mount a file system."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0


# -- cases


@dataclass(frozen=True)
class Usual:
    """An undisturbed run of a work."""

    seconds: float
    changes: int  # of the file system
    room: int  # bytes of its output
    files: dict[str, str]  # and their digests, but for those that tell times: these have none


def run_usually(stage: Stage, work: Work) -> Usual:
    stage.clear()
    began = time.monotonic()
    told = stage.start(work).wait()
    seconds = time.monotonic() - began
    if told.code:
        raise RuntimeError(f"{work.command} fails undisturbed: {told.last}")
    files = digests(stage.out)
    for name in files:
        if Path(name).name in work.ignored:
            files[name] = ""
    room = sum(path.stat().st_size + 4096 for path in stage.out.rglob("*"))
    return Usual(seconds, told.changes, room, files)


def run_case(stage: Stage, work: Work, usual: Usual, harm: str, random: Random) -> tuple[list[str], str]:
    """The flags of a case, and what happened."""
    stage.clear()
    flags, story = HARMS[harm](stage, work, usual, random)
    flags += [] if not _left_processes(stage) else ["orphan"]
    for path in stage.out.rglob("*"):
        if path.is_file() and not path.name.startswith(".part-") and not is_whole(path):
            story += f"\n{path} cannot be read"
            flags.append("half")
    finished = marks(stage.out, work.kept)

    if work.random and len(digests(stage.out)) == len(usual.files):
        return sorted({*flags}), story
    told = stage.start(work).wait()
    if told.code:
        return [*flags, "again"], f"{story}\nthen exit {told.code}: {told.last}"
    if left := parts(stage.out):
        flags.append("part")
        story += f"\nleft: {left}"
    now = marks(stage.out, work.kept)
    if harm not in MOUNTS and any(now.get(name) != mark for name, mark in finished.items()):
        flags.append("lost")
    files = digests(stage.out)
    if work.random and len(files) == len(usual.files):
        files = usual.files
    for name in usual.files.keys() | files.keys():
        if usual.files.get(name) != "" and files.get(name) != usual.files.get(name):
            flags.append("different")
            story += f"\n{name} differs"
    return sorted({*flags}), story


def _left_processes(stage: Stage) -> list[int]:
    """Processes of the last command that live on after three seconds."""
    end = time.monotonic() + 3
    while left := _of_stage(stage):
        if time.monotonic() > end:
            return left
        time.sleep(0.1)
    return []


def _of_stage(stage: Stage) -> list[int]:
    """Living processes whose working directory is the stage."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            here = entry.name.isdigit() and os.readlink(entry / "cwd") == str(stage.cwd)
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0] if here else "Z"
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if here and state != "Z" and b"resource_tracker" not in command:
            found.append(int(entry.name))
    return found


def campaign(works: list[str], harms: list[str], cases: int, seed: int, out: Path) -> dict[str, Counter[str]]:
    """The flags of every work, printed as a table; the stories of flagged cases are written to `out`."""
    found = {}
    print(f"{'work':<10} {'cases':>6} {'seconds':>8}  flags", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder).resolve())
        for i, name in enumerate(works):
            count = cases // len(works) + (i < cases % len(works))
            began = time.monotonic()
            usual = run_usually(stage, WORKS[name])
            found[name] = Counter[str]()
            for number in range(count):
                harm = harms[number % len(harms)]
                random = Random(f"{seed} {name} {number}")
                flags, story = run_case(stage, WORKS[name], usual, harm, random)
                found[name].update(flags)
                if flags:
                    out.mkdir(parents=True, exist_ok=True)
                    text = f"{' '.join(flags)}\n{WORKS[name].command}\n{harm} {story}\n"
                    (out / f"{name}-{harm}-{number}.txt").write_text(text)
            told = ", ".join(f"{flag} {times}" for flag, times in found[name].items()) or "none"
            print(f"{name:<10} {count:>6} {time.monotonic() - began:>8.0f}  {told}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--works", default=",".join(WORKS), help="default: all")
    parser.add_argument("--harms", default=",".join(HARMS), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("failures"), help="for the flagged cases")
    options = parser.parse_args()
    works = options.works.split(",")
    harms = options.harms.split(",")
    for chosen, there in ((works, WORKS), (harms, HARMS)):
        unknown = {*chosen} - there.keys()
        if unknown:
            parser.error(f"unknown: {unknown.pop()}; choose from {', '.join(there)}")
    if MOUNTS & {*harms} and not can_mount():
        print("nothing can be mounted here; disks are left out")
        harms = [harm for harm in harms if harm not in MOUNTS]
    found = campaign(works, harms, options.cases, options.seed, options.out.absolute())
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())

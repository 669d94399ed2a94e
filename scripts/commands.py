"""Run every command that README.md and docs/*.md show, so that none of them rots.

    python -m scripts.commands                 all; exit code 1 if one fails
    python -m scripts.commands --list          what would be run for each
    python -m scripts.commands --only train    those that contain a text, or one of several

Commands are the lines of code blocks, and the spans of code that have an argument, that begin with one of
`PROGRAMS`. The blocks of a document marked "python" are one program; those marked "py" are clients of a
server, which tests/test_serve.py runs. Each is run once, on one thread, in a folder that holds what a user
would bring, with the package as `pip install .` lays it down. Unless `SHORTENED` says otherwise, training
and generation are run with a copy of the package in which models and recipes are small (stand_ins.py),
other commands as they stand. What was shortened is printed beside each. A row of the table that no document
needs any more is an error; so is a command that fails, or that leaves nothing at its `-o` or `--out`.
"""

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.stand_ins import ROOT, SIZES, shrink

PROGRAMS = ("cogvideo", "python", "python3", "torchrun", "pip", "pytest")
LONG = ("cogvideo train", "cogvideo generate", "cogvideo estimate --train", "torchrun")
PYTHON = "the blocks of Python"
LIMIT = 900  # seconds for a command, on a busy machine
TOLD = {
    "whole": "",
    "few": ", recipes of 2 steps of 2 clips",
    "nano": ", recipes of 2 steps of 2 clips, models of nano size",
}


@dataclass(frozen=True)
class Shorter:
    """How a command is shortened."""

    changes: tuple[tuple[str, str], ...] = ()  # texts that are replaced; $MODELS is where the nano models are
    more: str = ""  # arguments that are added
    size: str = "whole"  # of the package
    by: str = ""  # a file that runs it instead of this program

    def apply(self, command: str) -> str:
        """What is run; ValueError if a text that should be replaced is not there."""
        for old, new in self.changes:
            if old not in command:
                raise ValueError(f"{old!r} is not in {command!r}")
            command = command.replace(old, new)
        return f"{command} {self.more}".strip()


WHOLE = Shorter()


def nano(*changes: tuple[str, str], more: str = "") -> Shorter:
    return Shorter(changes, more, "nano")


def usual(command: str) -> Shorter:
    """How a command without a row is run: training and generation at nano size, with 4 steps and batches of 4
    where it asks for a number."""
    if not command.startswith(LONG):
        return WHOLE
    asked = re.findall(r"--\w+\.(?:steps|batch) \d+", command)
    return nano(*((one, f"{one.split()[0]} 4") for one in asked))


INSTALL = "python3 -m venv .venv && . .venv/bin/activate && pip install "
SHORTENED = {
    # what `pip install .` lays down is what all of them are run with
    f'{INSTALL}. && cogvideo generate "a dog runs to the right across a green field" -o dog.mp4': Shorter(
        ((f"{INSTALL}. && ", ""),)
    ),
    f'{INSTALL}-e ".[dev]" && pytest -q': Shorter(by=".ci/run"),
    'cogvideo generate "a dog runs" --model direct-tiny': WHOLE,
    f"{PYTHON} in README.md": nano(),
    # the original: its files are stand-ins of the same construction, with 128 codes
    "cogvideo convert sat cogvideo-stage1.zip cogvideo-stage2.zip cogview2-dsr.zip models/cogvideo": Shorter(
        more="--codes 128"
    ),
    'cogvideo generate "一只小狗在草地上奔跑" --model models/cogvideo -o dog.mp4 --seed 1 --keep drafts': WHOLE,  # noqa: E501
    "python -m benchmarks.full_size": nano(),
    # judging: with few clips, and without the weights of others
    "cogvideo evaluate generated/ reference/ -o report.json --preset tinyworld --scorer tinyworld": Shorter(
        more="--few"
    ),
    "cogvideo evaluate generated/ reference/ -o fvd.json --preset ucf101 --extractors i3d "
    "--weights i3d=i3d_torchscript.pt": Shorter(
        (("--preset ucf101 --extractors i3d --weights i3d=i3d_torchscript.pt", "--few"),)
    ),
    "cogvideo evaluate generated/ reference/ -o paired.json --paired --count 512 --workers 8": Shorter(
        (("512", "8"), ("--workers 8", "--workers 2")), "--few"
    ),
    "cogvideo evaluate generated/ reference/ -o report.json --ray ADDRESS": Shorter(
        (("ADDRESS", "local"),), "--few"
    ),
    "cogvideo train tiny --init tiny --data my_videos/ --lora 16 --phases image --image.steps 400 "
    "--out runs/unicorn": nano(("400", "4")),
    "cogvideo push runs/tiny/model user/name": Shorter(by="tests/test_hub.py"),
    "cogvideo push runs/lora/lora user/adapter": Shorter(by="tests/test_hub.py"),
    "python examples/first_video.py": nano(("examples", f"{ROOT}/examples")),
    "python examples/own_world.py": nano(("examples", f"{ROOT}/examples"), more="2"),
    "python examples/client.py": Shorter(by="tests/test_serve.py"),
    "cogvideo data tokenize my_videos/ -o my_tokens/": nano(),
    "cogvideo train tiny --init tiny --data my_tokens/ --phases image stage1 stage2 --out runs/mine": nano(
        ("runs/mine", "runs/tokens")
    ),
    "cogvideo data world my_art/ -o my_world/": Shorter(more="--held-out 4 --judge-steps 1"),
    "cogvideo train tiny --data my_world/ --init tiny --phases image stage1 stage2 --image.steps 2000 "
    "--stage1.steps 500 --stage2.steps 500": nano(
        ("2000", "4"),
        ("stage1.steps 500", "stage1.steps 4"),
        ("stage2.steps 500", "stage2.steps 4"),
        ("my_world/", "my_world/ --out runs/world"),
    ),
    "cogvideo generate --prompts my_world/prompts.txt --model runs/tiny/model -o made/clip.mp4": nano(
        ("runs/tiny", "runs/world")
    ),
    "cogvideo evaluate made/ my_world/held_out/ -o report.json --preset tinyworld "
    "--scorer my_world/": Shorter(more="--few"),
    f"{PYTHON} in docs/own-world.md": nano(),
    "cogvideo judge new study --systems generated/ reference/ --real reference --mode pairs": Shorter(
        more="--size 64 --prompts captions.txt"
    ),
    "cogvideo judge serve study": Shorter(by="tests/test_study.py"),
    "cogvideo judge serve study --port 8000": Shorter(by="tests/test_study.py"),
    "cogvideo serve": Shorter(by="tests/test_serve.py"),
    "cogvideo serve --host 0.0.0.0 --api-keys keys.txt": Shorter(by="tests/test_serve.py"),
    "cogvideo serve --workers 0 --database postgresql://user@db/videos --results /mnt/videos --host 0.0.0.0 "
    "--api-keys keys.txt": Shorter(by="tests/test_serve.py"),
    "cogvideo worker --database postgresql://user@db/videos --results /mnt/videos": Shorter(
        by="tests/test_serve.py"
    ),
    "python -m scripts.postgres": Shorter(by="tests/test_serve.py"),
    "python -m benchmarks.serve load --threads 2": nano(more="--clients 1 --minutes 0.1 --threads 1"),
    "python -m benchmarks.serve memory --jobs 1000 --model models/nano": nano(
        ("1000", "4"), ("models/nano", "$MODELS/tiny")
    ),
    "python -m benchmarks.serve kills --kills 30 --model models/nano": nano(
        ("30", "1"), ("models/nano", "$MODELS/tiny")
    ),
    "cogvideo judge report study": Shorter((("report study", "report voted"),)),
    # training
    "torchrun --nproc-per-node 8 -m cogvideo train tiny --out runs/tiny": nano(
        (" 8 ", " 2 "), ("runs/tiny", "runs/two")
    ),
    "cogvideo estimate --train cogvideo-9b --mesh 8x8": WHOLE,
    "torchrun --nproc-per-node 4 --max-restarts 3 -m cogvideo train tiny --mesh 1x2x2 "
    "--image.optimizer adamw --phases image --out runs/mesh": nano(
        (" 4 ", " 2 "), ("1x2x2", "1x1x2"), more="--init tiny"
    ),
    "torchrun --nproc-per-node 2 -m cogvideo generate --prompts prompts.txt --seed 1 -o out.mp4": nano(),
    'torchrun --nproc-per-node 2 -m cogvideo generate "a dog runs" --slices 2 --dtype float32 --seed 1 '
    "-o dog.mp4": nano(),
    "cogvideo train tiny --out runs/tiny6w --phases image --processes 1 --threads 1 --save-every 25 "
    "--image.lr 7e-4": nano(("runs/tiny6w", "runs/tiny")),
    "cogvideo train tiny --init tiny --data noto_world --phases image --image.steps 600 --image.batch 32 "
    "--image.lr 4e-4 --processes 1 --threads 1 --save-every 20 --probe-every 100 --out runs/noto": nano(
        ("noto_world", "my_world"), ("steps 600", "steps 2"), ("batch 32", "batch 2")
    ),
    "python -m scripts.on_gpu MODEL OUT base:240 stage1:138 stage2:125 --total 512": nano(
        ("MODEL OUT", "runs/tiny/model runs/gpu"),
        ("240", "1"),
        ("138", "1"),
        ("125", "1"),
        more="--device cpu --eager --workers 0 --batch 2",
    ),
    "cogvideo train tiny --out runs/mis1 --init tiny --phases mistakes --processes 1 --threads 1 "
    "--save-every 50 --mistakes.steps 1500": nano(("1500", "2")),
    "cogvideo train tiny --init runs/adv1/full --out runs/adv2 --phases mistakes --processes 1 --threads 1 "
    "--save-every 20 --mistakes.adversary 0.1 --mistakes.steps 1000": nano(
        ("adv1/full", "adv1/model"), ("1000", "2")
    ),
    "cogvideo train direct-tiny": nano(more="--out runs/direct"),
    "cogvideo train direct-tiny --init runs/pictures/model --phases low high": nano(
        ("runs/pictures/model", "runs/direct/model"), more="--out runs/again"
    ),
    "cogvideo train direct-gpt2 --data clips.csv --init-embedding openai-community/gpt2": nano(
        ("openai-community/gpt2", "gpt2.safetensors")
    ),
    # what was measured
    "python -m benchmarks.ablate base --model runs/tiny/model": nano(
        more="--variants recipe --minutes 0.01 --clips 2 --layers 1 --width 64"
    ),
    "python -m benchmarks.ablate decoder --model runs/tiny/model": nano(
        more="--variants recipe --minutes 0.01 --clips 2"
    ),
    "python -m benchmarks.ablate base --model tiny --layers 4 --width 256 --sprites 12 --minutes 13": nano(
        ("4", "1"), ("256", "64"), ("13", "0.01"), more="--variants recipe --clips 2"
    ),
    "python -m benchmarks.ablate decoder --model tiny --minutes 7 --clips 24": nano(
        ("7", "0.01"), ("24", "2"), more="--variants recipe"
    ),
    "python -m benchmarks.rivals train raster --minutes 60": Shorter(by="tests/test_rivals.py"),
    'python -m benchmarks.speedrun --seed 0 --change "what is new"': Shorter(by="tests/test_speedrun.py"),
    "python -m benchmarks.classifier": Shorter(more="--steps 2 --count 2"),
    "python -m benchmarks.classifier --judge frame": Shorter(more="--steps 2 --count 2"),
    "python -m benchmarks.ladder --model tiny --clips 32": nano(("32", "1"), more="--shown 1"),
    "python -m benchmarks.ladder --vqvae cogvideo/models/tiny/vqvae.safetensors --clips 64": nano(
        ("cogvideo/models/tiny", "$MODELS/tiny"), ("64", "1"), more="--shown 1"
    ),
    "python -m benchmarks.adherence --model tiny --reconstructions": nano(more="--count 2 --chinese 2"),
    "python -m benchmarks.adherence --model tiny --frames 9": nano(more="--count 2 --chinese 2"),
    "python -m benchmarks.adherence --model tiny --frames 9 --count 96 --lora runs/unicorn/lora": nano(
        ("--count 96", "--count 2"), more="--chinese 2 --out runs/adapted"
    ),
    "python -m benchmarks.phrasings --model tiny --out runs/phrasings": nano(more="--sprites 2"),
    "python -m benchmarks.fidelity --model tiny": nano(more="--count 2 --refiner-count 1"),
    "python -m benchmarks.hierarchical --steps 600": nano(("600", "3"), more="--count 2"),
    "python -m benchmarks.precision --count 16": nano(("16", "1")),
    "python -m benchmarks.regression phases --count 192": Shorter(
        (("192", "2"),), "--model $MODELS/tiny", "few"
    ),
    "python -m benchmarks.regression losses --steps 600": Shorter((("600", "2"),), "--count 2", "few"),
    "python -m benchmarks.generate --model direct-tiny --runs 7 --threads 2": nano(("7", "1"), ("2", "1")),
    "python -m benchmarks.generate --model tiny --runs 5": nano(("5", "1")),
    "python -m benchmarks.generate --model tiny --runs 2 --together 16": nano(("--runs 2", "--runs 1")),
    "python -m benchmarks.step --threads 2": nano(
        ("2", "1"), more='--steps 2 --sizes "12 x 768" --dtypes int8 --windows 1'
    ),
    "python -m benchmarks.bfloat16": Shorter(more="--rounds 1"),
    "python -m benchmarks.gpu": nano(more="--device cpu --sizes nano --recipe none --runs 1"),
    "pytest -m gpu": Shorter(by="tests/test_gpu.py"),
    "python -m scripts.matrix": Shorter(more="--help"),
    "python -m scripts.pictures --model tiny --drawn 24 --columns 6 --size 96 -o docs/pictures/gallery.webp": nano(  # noqa: E501
        (" 24 ", " 2 "), ("docs/pictures/", ""), more="--num-frames 1"
    ),
    "python -m scripts.campaign.files --cases 10000": Shorter(by="tests/test_campaign_files.py"),
    "python -m scripts.campaign.inputs --cases 10000": Shorter(by="tests/test_campaign_inputs.py"),
    "python -m scripts.campaign.loss --cases 300": Shorter(by="tests/test_campaign_loss.py"),
    "python -m benchmarks.train_step": nano(more="--phases image --rounds 1 --steps 1"),
    "python -m benchmarks.train_step --rounds 1": nano(more="--phases stage2 --steps 1"),
    "python -m benchmarks.train_memory --threads 2 --runs 2": nano((" 2", " 1")),
    "python -m benchmarks.decode --runs 15": Shorter((("15", "1"),), "--videos 1 --clips 2 --size 64"),
}


@dataclass(frozen=True)
class Task:
    """What is run for a command of a document."""

    document: str
    shown: str
    run: str
    shorter: Shorter

    def __str__(self) -> str:
        lines = [f"{self.document}: {self.shown}"]
        if self.shorter.by:
            return f"{lines[0]}\n    is run by {self.shorter.by}"
        how = TOLD[self.shorter.size]
        if self.run != self.shown:
            lines.append(f"    run as: {self.run}{how}")
        elif how:
            lines.append(f"    run with{how[1:]}")
        return "\n".join(lines)


# -- what the documents show


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def pieces(markdown: str) -> Iterator[tuple[str, str]]:
    """What there is in order: ("line", a line of a code block), ("python" or "py", a block) or ("text", what
    is between)."""
    fence, block, text = "", [], []
    for line in markdown.splitlines():
        indented = not fence and line.startswith("    ")
        if text and (indented or line.startswith("```")):
            yield "text", "\n".join(text)
            text = []
        if line.startswith("```"):
            if fence in ("```python", "```py"):
                yield fence.removeprefix("```"), "\n".join(block)
            elif fence:
                yield from (("line", one) for one in block)
            fence, block = "" if fence else line.strip(), []
        elif fence:
            block.append(line)
        elif indented:
            yield "line", line.strip()
        else:
            text.append(line)
    yield "text", "\n".join(text)


def spans(text: str) -> list[str]:
    """Spans of code, each in one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def is_name(span: str) -> bool:
    """Whether it only names a command, as in `cogvideo train`, and has no argument."""
    return len(span.split()) == 2 and span.startswith("cogvideo ")


def commands_of(markdown: str) -> list[str]:
    """Each command once, in the order of the text; a note after two blanks is left out."""
    found = []
    for kind, content in pieces(markdown):
        if kind == "line":
            found.append(re.split(r"\s{2,}", content)[0])
        elif kind == "text":
            found += [span for span in spans(content) if not is_name(span)]
    return [one for one in dict.fromkeys(found) if one.startswith(tuple(f"{name} " for name in PROGRAMS))]


def names_of(markdown: str) -> list[str]:
    """The verbs of those spans that only name a command."""
    text = (span for kind, content in pieces(markdown) if kind == "text" for span in spans(content))
    return [span.split()[1] for span in text if is_name(span)]


def program_of(markdown: str) -> str:
    """The blocks of Python as one program."""
    return "\n\n".join(content for kind, content in pieces(markdown) if kind == "python")


def plan() -> Iterator[Task]:
    """What to run; ValueError if a row of the table is of no use."""
    rows, seen = dict(SHORTENED), set()
    for path in documents():
        name, markdown = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        shown = [one for one in commands_of(markdown) if one not in seen]
        if program_of(markdown):
            shown.append(f"{PYTHON} in {name}")
        seen.update(shown)
        for command in shown:
            shorter = rows.pop(command, None) or usual(command)
            yield Task(name, command, shorter.apply(command), shorter)
    if rows:
        raise ValueError(f"no document shows {'; '.join(rows)}; take it out of SHORTENED")


# -- running it


class Place:
    """A folder with the package in its sizes, and `files`, in which commands are run."""

    def __init__(self, folder: Path):
        self.folder = folder
        source, whole = folder / "source", folder / "whole"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        for file in filter(lambda file: (ROOT / file).is_file(), listed):
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, source / file)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", whole, "."]
        subprocess.run(pip, cwd=source, check=True)
        for size in SIZES:
            shrink(whole / "cogvideo", folder / size / "cogvideo", size)
        shutil.rmtree(models := folder / "nano" / "cogvideo" / "models")
        for what, where, size in (("models", models, "nano"), ("files", folder / "files", "whole")):
            command = [sys.executable, "-m", "scripts.stand_ins", what, where]
            subprocess.run(command, env=self.environment(size), cwd=folder, check=True)

    def environment(self, size: str) -> dict[str, str]:
        programs = (self.folder / "whole" / "bin", Path(sys.executable).parent, os.environ["PATH"])
        changed = {
            "PATH": programs,
            "PYTHONPATH": (self.folder / size, ROOT),
            "OMP_NUM_THREADS": "1",
            "MODELS": (self.folder / "nano" / "cogvideo" / "models",),
        }
        return os.environ | {name: os.pathsep.join(map(str, paths)) for name, paths in changed.items()}

    def run(self, task: Task) -> str:
        """Why it failed, or nothing."""
        here = self.folder / "files"
        command = task.run
        if task.shown.startswith(PYTHON):
            program = program_of((ROOT / task.document).read_text(encoding="utf-8"))
            (here / "program.py").write_text(program, encoding="utf-8")
            command = "python program.py"
        try:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=here,
                env=self.environment(task.shorter.size),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=LIMIT,
            )
        except subprocess.TimeoutExpired:
            return f"it took more than {LIMIT} s"
        if done.returncode:
            return f"exit code {done.returncode}: {(done.stdout + done.stderr)[-3000:]}"
        for out in re.findall(r"(?:-o|--out) (\S+)", task.run):
            numbered = Path(out).with_name(f"{Path(out).stem}-0{Path(out).suffix}")
            if not (here / out).exists() and not (here / numbered).exists():
                return f"there is no {out}"
        return ""


def seconds() -> float:
    """Of processors, that all processes took which were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description="run the commands of the documents")
    parser.add_argument("--list", action="store_true", help="only tell what would be run")
    parser.add_argument("--only", nargs="+", default=[""], help="texts of which one is in the command")
    arguments = parser.parse_args()
    tasks = [task for task in plan() if any(one in task.shown for one in arguments.only)]
    if arguments.list:
        print(*tasks, sep="\n")
        return
    failed, begun = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        print(f"package and files, {seconds():.1f} s of processor", flush=True)
        for task in tasks:
            before = seconds()
            why = "" if task.shorter.by else place.run(task)
            print(f"{task}  {seconds() - before:.1f} s", flush=True)
            if why:
                failed.append(task)
                print(f"    FAILED: {why}", flush=True)
    print(f"{seconds():.0f} s of processor, {time.perf_counter() - begun:.0f} s in all")
    print(f"{len(tasks) - len(failed)} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

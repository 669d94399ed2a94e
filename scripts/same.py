"""Nothing changed: what two versions of the package compute, compared to the bit.

    python -m scripts.same                      the working tree against the last commit
    python -m scripts.same --against 72d9e99    against another commit
    python -m scripts.same --only train         only cases whose name contains a text, or one of several

Each case is a command. It runs once with the package of the commit and once with the package of the working
tree, in a folder of its own with the same files. Every file that it leaves in `out` is compared: videos by
their bytes, tokens and weights tensor by tensor, logs by their losses. Models, checkpoints and runs that a
case begins with are written by the package of the commit, so what was stored before must still load and
resume.

Exit code 1 if anything differs. Digests of a commit are kept in runs/same: a second run takes half the time.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "runs" / "same"
FORMER = {"direct": "regression"}  # names that changed, and what they are now
LIMIT = 900  # seconds for a command, on a busy machine
SPEEDS = ("clips_per_second", "mfu")  # keys of a log that no two runs have in common
SKIPPED = (".pt", ".html")  # the weights of a state are in the model folder as well
Digests = dict[str, dict[str, str]]  # by case, then by file or tensor


@dataclass(frozen=True)
class Case:
    """A command, run in an empty folder next to `files` and `models`."""

    command: str
    size: str = "whole"  # of the package: whole, or nano with random models under the shipped names
    before: str = ""  # a command that runs first, with the package of the commit


def generate(
    options: str, size: str = "whole", prompt: str = "a dog runs to the right", seed: str = "--seed 3"
) -> Case:
    return Case(f'cogvideo generate "{prompt}" --threads 1 -o out/clip.mp4 {seed} {options}', size)


def train(recipe: str, phase: str, options: str = "", steps: int = 20, before: str = "") -> Case:
    """A phase of a recipe that starts from the random model and is resumed after `before` steps. No caption
    is dropped: since the second edition of the house that takes the sample's own random numbers, as does the
    start of a codebook, so only a resumed tokenizer can be compared."""
    command = f"cogvideo train {recipe} --init ../models/{recipe} --phases {phase} --out out --threads 1"
    command += " --processes 1 --save-every 5 --log-every 1 --probe-every 10"
    command += f" --{phase}.warmup 1 --{phase}.decay 0 --{phase}.drop 0 {options}"
    first = f"{command} --{phase}.steps {before}" if before else ""
    return Case(f"{command} --{phase}.steps {steps}", "nano", first)


def cases() -> dict[str, Case]:
    kept = "--keep out/drafts"
    found = {
        "generate english": generate(kept),
        "generate chinese": generate(kept, prompt="一只小狗在草地上奔跑"),
        "generate several": generate(f"{kept} --num-videos 3 --num-frames 5", "nano"),
        "generate regression": generate("--model direct-tiny", seed=""),
        "generate regression bfloat16": generate("--model direct-tiny --dtype bfloat16", seed=""),
        "generate image": generate(f"{kept} --image ../files/cat.png --num-frames 9"),
        "generate video": generate(f"{kept} --video ../files/my_videos/a.mp4 --num-frames 9"),
        "generate prompts": Case(
            f"cogvideo generate --prompts ../files/prompts.txt --threads 1 --seed 3 "
            f"-o out/clip.mp4 --num-frames 9 {kept}",
            "nano",
        ),
        "generate guided": generate(f"{kept} --guidance-scale 3 --num-frames 5"),
        "generate unguided": generate(f"{kept} --guidance-scale 1 --num-frames 5"),
        "generate quirks": generate(f"{kept} --reference-quirks --num-frames 9", "nano"),
        "generate gif": Case('cogvideo generate "a cat" --threads 1 -o out/clip.gif --seed 4', "nano"),
        "generate from converted": Case(
            f'cogvideo generate "狗" --model ../models/cogvideo --threads 1 --seed 3 -o out/clip.mp4 {kept}'
        ),
        "models": Case(
            "mkdir out && cogvideo models tiny | sed 1d > out/tiny.txt && "
            "cogvideo models direct-tiny | sed 1d > out/direct-tiny.txt"
        ),
    }
    for frames in (1, 5, 9, 17, 33):
        found[f"generate {frames} frames"] = generate(f"{kept} --num-frames {frames}", "nano")
    for dtype in ("float32", "bfloat16", "int8"):
        found[f"generate {dtype}"] = generate(f"{kept} --dtype {dtype} --num-frames 9")
        found[f"generate nano {dtype}"] = generate(f"{kept} --dtype {dtype}", "nano")
    for phase in ("crops", "tokenizer", "image", "stage1", "stage2", "decoder", "mistakes"):
        found[f"train {phase}"] = train("tiny", phase, steps=210 if phase in ("crops", "tokenizer") else 20)
        found[f"resume {phase}"] = train("tiny", phase, before="10")
    for phase in ("image", "low", "high", "refiner"):
        found[f"train regression {phase}"] = train("direct-tiny", phase)
        found[f"resume regression {phase}"] = train("direct-tiny", phase, before="10")
    found["train muon in bfloat16"] = train(
        "tiny", "image", "--image.optimizer muon --image.precision bfloat16"
    )
    found["train adamw in float32"] = train(
        "tiny", "stage1", "--stage1.optimizer adamw --stage1.precision float32"
    )
    found["train clips that recur"] = train("tiny", "image", "--image.reuse 3")
    found["train own data"] = Case(
        "cogvideo train tiny --data ../files/my_videos --phases image --init ../models/tiny --out out "
        "--processes 1 --threads 1 --image.steps 5 --log-every 1 --image.drop 0",
        "nano",
    )
    found["convert"] = Case(
        "cogvideo convert sat ../files/cogvideo-stage1.zip ../files/cogvideo-stage2.zip "
        "../files/cogview2-dsr.zip out --codes 128 && "
        "cogvideo convert icetk ../files/ICETK_MODELS out"
    )
    return found


# -- running a case


class Tree:
    """The package of a commit, or of the working tree, in its sizes."""

    def __init__(self, folder: Path, source: Path):
        self.folder, self.source = folder, source
        make = (
            f"from pathlib import Path; from scripts.stand_ins import shrink; "
            f"shrink(Path('cogvideo'), Path({str(folder / 'nano' / 'cogvideo')!r}), 'nano')"
        )
        subprocess.run([sys.executable, "-c", make], cwd=source, check=True)
        os.symlink(source, folder / "whole")

    def run(self, command: str, size: str, here: Path) -> None:
        """Raise CalledProcessError if the command fails."""
        found = self.folder / size
        environment = os.environ | {"PYTHONPATH": f"{found}{os.pathsep}{self.source}", "OMP_NUM_THREADS": "1"}
        program = f'cogvideo() {{ {sys.executable} -m cogvideo "$@"; }}; set -e; {command}'
        subprocess.run(
            ["bash", "-c", program],
            cwd=here,
            env=environment,
            check=True,
            timeout=LIMIT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def stand_ins(self, what: str, where: Path, size: str) -> None:
        self.run(f"{sys.executable} -m scripts.stand_ins {what} {where}", size, self.source)


def export(commit: str, folder: Path) -> Path:
    """The files of a commit below `folder`."""
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "x"], cwd=folder, input=archive, check=True)
    return folder


def write_inputs(tree: Tree, place: Path) -> None:
    """`files` and `models` next to the folders of the cases, by the package of the commit."""
    tree.stand_ins("files", place / "files", "whole")
    tree.stand_ins("models", place / "models", "nano")
    tree.run(
        "cogvideo convert sat files/cogvideo-stage1.zip files/cogvideo-stage2.zip files/cogview2-dsr.zip "
        "models/cogvideo --codes 128 && cogvideo convert icetk files/ICETK_MODELS models/cogvideo",
        "whole",
        place,
    )


def run(case: Case, tree: Tree, commit: Tree, place: Path) -> dict[str, str]:
    """The digests of what a case leaves, or {"failed": why}."""
    here = place / "here"  # the same path for both trees
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    try:
        if case.before:
            commit.run(case.before, case.size, here)
        tree.run(case.command, case.size, here)
    except subprocess.CalledProcessError as error:
        return {"failed": (error.stdout + error.stderr)[-1000:]}
    found: dict[str, str] = {}
    for file in sorted((here / "out").rglob("*")):
        if file.is_file() and file.suffix not in SKIPPED:
            found |= dict(digests(file, str(file.relative_to(here))))
    return found or {"failed": "nothing in out"}


def present(value: object) -> object:
    """A value of config.json with the present names of family and parts."""
    if isinstance(value, dict):
        return {FORMER.get(key, key): present(one) for key, one in value.items()}
    if isinstance(value, list):
        return [present(one) for one in value]
    return FORMER.get(value, value) if isinstance(value, str) else value


def digests(file: Path, name: str) -> Iterator[tuple[str, str]]:
    """Names of what a file holds, each with its digest."""
    name = name.replace(file.stem, FORMER.get(file.stem, file.stem))
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        for key, tensor in load_file(file).items():
            yield (
                f"{name}: {key}",
                hashed(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.flatten().tolist()}"),
            )
    elif file.suffix == ".npz":
        import numpy as np

        with np.load(file) as arrays:
            for key in arrays.files:
                yield (
                    f"{name.rsplit('/', 1)[0]}/{file.stem.split('-')[-1]}: {key}",
                    hashed(repr(arrays[key].tolist())),
                )
    elif file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row = {key: value for key, value in row.items() if key not in SPEEDS}
            yield f"{name}: step {row.get('step')}", hashed(json.dumps(row, sort_keys=True))
    elif file.suffix == ".json":
        yield name, hashed(json.dumps(present(json.loads(file.read_text())), sort_keys=True))
    elif file.name != "loss.png":  # which shows the same rows
        yield name, hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compare(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs, one line each."""
    if "failed" in before or "failed" in now:
        which = "before" if "failed" in before else "now"
        why = before.get("failed") or now.get("failed") or ""
        return [f"fails {which}: {' '.join(why.split())[-300:]}"]
    lines = [f"{name} is missing" for name in before if name not in now]
    lines += [f"{name} is new" for name in now if name not in before]
    return lines + [f"{name} differs" for name in before if now.get(name, before[name]) != before[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description="compare what two versions of the package compute")
    parser.add_argument("--against", default="HEAD", help="a commit")
    parser.add_argument("--only", nargs="+", default=[""], help="texts of which one is in the name of a case")
    arguments = parser.parse_args()
    chosen = {name: case for name, case in cases().items() if any(one in name for one in arguments.only)}
    resolve = ["git", "rev-parse", "--short=12", arguments.against]
    name = subprocess.run(resolve, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    kept = KEPT / f"{name}.json"
    known: Digests = json.loads(kept.read_text()) if kept.exists() else {}
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "before").mkdir()
        (place / "now").mkdir()
        commit = Tree(place / "before", export(name, place / "commit"))
        working = Tree(place / "now", ROOT)
        write_inputs(commit, place)
        for title, case in chosen.items():
            asked = hashed(repr(case))
            if known.get(title, {}).get("case") != asked:
                known[title] = {"case": asked, **run(case, commit, commit, place)}
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(known, indent=1))
            before = {key: value for key, value in known[title].items() if key != "case"}
            lines = compare(before, run(case, working, commit, place))
            print(
                f"{title}: " + (f"{len(before)} the same" if not lines else f"{len(lines)} differ"),
                flush=True,
            )
            for line in lines[:5]:
                print(f"    {line}", flush=True)
            differing += bool(lines)
    print(f"{len(chosen) - differing} cases are the same, {differing} differ")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()

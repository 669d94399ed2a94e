"""The command line of the contest: see the package's docstring."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import benchmarks.rivals
from benchmarks import frame_judge
from benchmarks.rivals.ablations import ABLATIONS
from benchmarks.rivals.contest import Prompt, Size, System, prompts, rendered
from benchmarks.rivals.diffusion import Diffusion
from benchmarks.rivals.direct import Direct
from benchmarks.rivals.ours import Ours, Still
from benchmarks.rivals.phenaki import Phenaki
from benchmarks.rivals.raster import Raster
from cogvideo.eval.evaluate import Report, Request, evaluate
from cogvideo.eval.protocol import Protocol
from cogvideo.files import write_json
from cogvideo.video import Clip

KINDS: tuple[type[System], ...] = (Ours, Still, Direct, Raster, Diffusion, Phenaki, *ABLATIONS)
SYSTEMS = {kind.name: kind for kind in KINDS}
SEEDS = range(4)  # of trainings that are looked for
PROTOCOL = Protocol(frames=33, fps=8, size=96, filter="area")
BATCH = 8  # videos generated together


def write_videos(system: System, rows: Sequence[Prompt], folder: Path) -> float:
    """Generate the videos that are missing; return the seconds of one core that a video takes."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = folder.parent / "taken.json"
    seconds: list[float] = json.loads(taken.read_text()) if taken.exists() else []
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        files = [folder / f"out-{i}.mp4" for i in range(first, first + len(part))]
        if all(file.exists() for file in files):
            continue
        started = time.process_time()
        clips = system.generate([row.caption for row in part], range(first, first + len(part)))
        seconds.append((time.process_time() - started) / len(part))
        for file, clip in zip(files, clips):
            clip.save(file)
        write_json(taken, seconds)
    return float(np.mean(seconds)) if seconds else float("nan")


def measure(folder: Path, reference: Path, rows: Sequence[Prompt], judge: frame_judge.FrameJudge) -> dict:
    """The numbers of a folder of videos."""
    networks = ("efficientnet-lite0", "tinyworld")
    request = Request(folder, reference, PROTOCOL, networks, few=True, scorer="tinyworld")
    report: Report = evaluate(request)
    found = {f"{r.extractor} {r.kind}": r for r in report.sets if r.kind == "frechet"}
    values = {}
    for name, result in found.items():
        values[f"{name} at half"] = result.halves.mean
        values[f"{name} floor"] = result.floor.mean
    values |= {r.measure: r.value for r in (*report.adherence, *report.generated)}
    frames = [Clip.load(folder / f"out-{i}.mp4").frames for i in range(len(rows))]
    seen = frame_judge.judge(judge, frames, [row.scene.sprite for row in rows])
    values["frames recognised (%)"] = 100 * seen.frames_right
    values["neighbours alike (%)"] = 100 * seen.neighbours_alike
    return values


COLUMNS = (
    "all three right (%)",
    "sprite right (%)",
    "motion right (%)",
    "place right (%)",
    "frames recognised (%)",
    "neighbours alike (%)",
    "tinyworld frechet at half",
    "efficientnet-lite0 frechet at half",
    "motion",
    "flicker",
)


def table(results: dict[str, dict]) -> str:
    names = ["system", *COLUMNS, "parameters (M)", "minutes", "s a video"]
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    for name, values in sorted(results.items(), key=lambda row: _rank(row[0])):
        cells = [f"{values[column]:.1f}" for column in COLUMNS]
        more = [f"{values.get(key, float('nan')):.1f}" for key in ("parameters", "minutes", "seconds")]
        lines.append("| " + " | ".join([name, *cells, *more]) + " |")
    return "\n".join(lines)


def _rank(name: str) -> tuple[int, str]:
    """Rendered clips first, then the systems in the order of the table, with their seeds."""
    order = ["rendered", *SYSTEMS]
    return order.index(name.partition("-seed")[0]), name


def sheet(folders: dict[str, Path], count: int, out: Path) -> None:
    """A row of nine frames for each system, for the first prompts."""
    blocks = []
    for i in range(count):
        for folder in folders.values():
            frames = Clip.load(folder / f"out-{i}.mp4").square(96).frames[::4]
            blocks.append(np.concatenate(list(frames), 1))
    Image.fromarray(np.concatenate(blocks)).save(out)


def folder_of(name: str, seed: int) -> str:
    return name if seed == 0 else f"{name}-seed{seed}"


def trained(size: Size, out: Path) -> dict[str, System]:
    """The systems that have been trained, of all seeds."""
    found = {}
    for name, kind in SYSTEMS.items():
        for seed in SEEDS:
            system = kind(size, out / folder_of(name, seed))
            if system.minutes:
                found[folder_of(name, seed)] = system
    return found


def judge_all(args: argparse.Namespace, size: Size) -> None:
    rows = prompts(size.names, args.count)
    judge = frame_judge.load(args.judge)
    reference = args.out / "rendered"
    other = args.out / "others"  # other scenes of the same kind: what a perfect model would make
    for folder, these in ((reference, rows), (other, prompts(size.names, 2 * args.count)[args.count :])):
        folder.mkdir(parents=True, exist_ok=True)
        for i, clip in enumerate(rendered(these, 192)):
            if not (folder / f"out-{i}.mp4").exists():
                clip.save(folder / f"out-{i}.mp4")
    results = json.loads(args.report.read_text()) if args.report.exists() else {}
    folders = {"rendered": reference}
    results["rendered"] = measure(reference, other, rows, judge)
    for name, system in trained(size, args.out).items():
        folders[name] = args.out / name / "videos"
        seconds = write_videos(system, rows, folders[name])
        values = measure(folders[name], other, rows, judge)
        values |= {"parameters": system.parameters / 1e6, "minutes": system.minutes, "seconds": seconds}
        results[name] = values
        write_json(args.report, results)
    sheet(folders, min(4, args.count), args.out / "sheet.png")
    print(table(results))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=benchmarks.rivals.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("train", "judge"))
    parser.add_argument("name", nargs="?", choices=list(SYSTEMS))
    parser.add_argument("--minutes", type=float, default=60, help="of one core, in all")
    parser.add_argument("--lr", type=float, help="default: the system's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=64, help="videos that are judged")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--sprites", type=int, default=12)
    parser.add_argument("--model", default="tiny", help="whose tokenizer is used")
    parser.add_argument("--judge", type=Path, default=frame_judge.FILE)
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"))
    parser.add_argument(
        "--report", type=Path, default=Path("docs/rivals.json"), help="rows of other machines stay in it"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = Size(args.layers, args.width, args.sprites, args.model)
    if args.action == "judge":
        judge_all(args, size)
    elif args.name is None:
        parser.error(f"name one of {', '.join(SYSTEMS)}")
    else:
        system = SYSTEMS[args.name](size, args.out / folder_of(args.name, args.seed))
        system.train(args.minutes, args.lr, args.seed)


if __name__ == "__main__":
    main()

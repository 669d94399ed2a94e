"""The ledger of records: from nothing to a judged model in a fixed time.

    python -m benchmarks.speedrun --seed 0 --change "what is new"
    python -m benchmarks.speedrun --minutes 120 --seed 0 --change "what is new"

The first takes 20 minutes of two cores, and then the judging. Everything is free: sizes, phases, their
shares, the code. Fixed are the world (the first 12 sprites), the time (of each of --cores processes,
tokenizer included), and the rules: 64 prompts about held-out compositions, judged by the shipped classifier
of the tiny world; the score is the share of clips whose sprite, motion and place are all right. A record is
the mean of the seeds 0, 1 and 2 (one seed at 120 minutes). `RULES` is the hash of judge, prompts and held-out
scenes: a run by other rules is refused.

A run adds a line to docs/ledger.jsonl and writes the table of docs/ledger.md anew.
"""

import argparse
import hashlib
import json
import subprocess
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from benchmarks.rivals.contest import Size, prompts
from benchmarks.rivals.ours import Ours
from benchmarks.rivals.phased import Part
from cogvideo.eval import tinyworld
from cogvideo.eval.extractors import TinyWorldJudge
from cogvideo.eval.protocol import Protocol
from cogvideo.files import file_digest
from cogvideo.model.families import CogVideoSpec
from cogvideo.model.folder import ModelFolder

SPRITES = 12
COUNT = 64
RULES = "593773b7616cf006c6f6e4af1da8e2ead6016a41e0d13c34712da2b00d7c6b8d"
ROOT = Path(__file__).parent.parent
LEDGER = ROOT / "docs" / "ledger.jsonl"
PAGE = ROOT / "docs" / "ledger.md"
MARK = "<!-- the table below is written by benchmarks/speedrun.py -->"


class FromNothing(Ours):
    """Tokenizer, base and both stages, one after the other."""

    name = "from nothing"
    plan: ClassVar[tuple[Part, ...]] = (
        Part("crops", 0.25),
        Part("image", 0.35),
        Part("stage1", 0.2),
        Part("stage2", 0.2),
    )

    @property
    def spec(self) -> CogVideoSpec:
        spec = super().spec
        return replace(spec, vqvae=replace(spec.vqvae, channels=32))

    def start(self) -> ModelFolder | None:
        return None


@dataclass(frozen=True)
class Entry:
    """A line of the ledger."""

    day: str
    commit: str
    change: str
    minutes: float
    cores: int
    seed: int
    score: float  # percent of clips with sprite, motion and place right
    sprite: float
    motion: float
    place: float
    rules: str


def rules() -> str:
    """The hash of all that decides a score but the model: judge, prompts, scenes that are held out."""
    sha = hashlib.sha256(file_digest(tinyworld.SHIPPED).encode())
    for row in prompts(Size(sprites=SPRITES).names, COUNT):
        sha.update(f"{row.caption} {row.scene.sprite} {row.scene.motion} {row.scene.place}".encode())
    return sha.hexdigest()


def score(system: Ours) -> dict[str, float]:
    """What the judge sees in clips of the prompts, as percentages."""
    rows = prompts(system.size.names, COUNT)
    judge = TinyWorldJudge()
    features = []
    for first in range(0, COUNT, 16):
        part = rows[first : first + 16]
        clips = system.generate([row.caption for row in part], range(first, first + len(part)))
        features += [judge.features(clip.frames, Protocol(frames=33, fps=8)) for clip in clips]
    seen = judge.seen(torch.cat(features))
    right = tinyworld.classes().asked([row.caption for row in rows]).right(seen).numpy()
    sprite, motion, place, together = 100 * np.nanmean(right, 0)
    return {"score": together, "sprite": sprite, "motion": motion, "place": place}


def table(entries: list[Entry]) -> str:
    """The records, best first: the mean over seeds of each change at each time."""
    groups: dict[tuple[float, int, str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.rules == RULES:
            groups[entry.minutes, entry.cores, entry.commit, entry.change].append(entry)
    lines = ["| minutes x cores | score % | of seeds | sprite, motion, place % | day | commit | change |"]
    lines.append("|---|---:|---|---|---|---|---|")
    for (minutes, cores, commit, change), rows in sorted(
        groups.items(), key=lambda group: (group[0][0], -np.mean([row.score for row in group[1]]))
    ):
        mean = np.mean([row.score for row in rows])
        each = ", ".join(f"{row.score:.1f}" for row in rows)
        parts = ", ".join(f"{np.mean([getattr(r, name) for r in rows]):.0f}" for name in tinyworld.HEADS)
        lines.append(
            f"| {minutes:g} x {cores} | {mean:.1f} | {each} | {parts} | {rows[0].day} | {commit} | {change} |"
        )
    return "\n".join(lines)


def read(file: Path = LEDGER) -> list[Entry]:
    if not file.exists():
        return []
    return [Entry(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def write_page(entries: list[Entry]) -> None:
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(f"{head}{MARK}\n\n{table(entries)}\n", encoding="utf-8")


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20, help="of each core")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--change", required=True, help="what is new, in a few words")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/speedrun"))
    parser.add_argument("--dry", action="store_true", help="add nothing to the ledger")
    args = parser.parse_args()
    if rules() != RULES:
        raise SystemExit(f"judge, prompts or held-out scenes are not those of the ledger: {rules()}")
    torch.set_num_threads(1)
    size = Size(args.layers, args.width, SPRITES)
    system = FromNothing(size, args.out / f"{commit()}-{args.minutes:g}-{args.seed}", processes=args.cores)
    system.train(args.minutes, None, args.seed)
    found = score(system)
    told = (commit(), args.change, args.minutes, args.cores, args.seed)
    entry = Entry(date.today().isoformat(), *told, **found, rules=RULES)
    print(json.dumps(asdict(entry)))
    if not args.dry:
        with LEDGER.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(entry)) + "\n")
        write_page(read())


if __name__ == "__main__":
    main()

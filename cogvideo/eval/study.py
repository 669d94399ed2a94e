"""A blind study with people: what is shown to whom is fixed before the first vote, and every vote is kept.

A study is a folder:
    study.json     the mode, the rules and the trials; it names no system
    key.json       which system each clip comes from; the server never sends it
    clips/         the clips under random names, all of one fps, size and length
    raters.jsonl   who consented, by a random number, and when
    votes.jsonl    one line a vote, written to disk before it is acknowledged

In `ratings` a trial is one clip, with the paper's questions: frame texture, motion realism and semantic
relevance from 1 to 5, and a total from 1 to 10 (CogVideo section 5.2). In `pairs` it is two clips of one
prompt, in `best` one of every system, of which the best is chosen. A rater gets trials in an order of their
own, some of them twice, and one trap: a clip that is a still, noisy frame (in pairs and best, next to
the intact one).
"""

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np

from cogvideo.eval.clips import Item, find_items
from cogvideo.eval.protocol import Protocol
from cogvideo.files import atomic_folder, parse_json, read_json, read_text, write_json
from cogvideo.limits import MOST_SEED, check_range
from cogvideo.model.config import Range, Total, read_table
from cogvideo.video import Clip, Frames

MODES = ("pairs", "ratings", "best")
# The qualities of ratings, and the highest score of each.
QUALITIES = {"texture": 5, "motion": 5, "relevance": 5, "total": 10}
TRAP = "trap"  # the system of destroyed clips
INTACT = "intact"  # and of the clips that are shown with them
RATER = re.compile(r"[0-9a-f]{32}")
CLIP = re.compile(r"[0-9a-f]{16}")  # the random name of a clip
T = TypeVar("T")


@dataclass(frozen=True)
class Rules:
    """Who is left out of the report; fixed before the first vote."""

    trap: bool = True  # raters who prefer the trap, or give it a total above `trap_total`
    trap_total: int = 5
    least_seconds: float = 1.0  # raters whose median vote took less
    least_agreement: float = 0.0  # raters who repeat fewer of their answers; 0: nobody

    def __post_init__(self) -> None:
        check_range("least_seconds", self.least_seconds, 0)
        check_range("least_agreement", self.least_agreement, 0, 1)


@dataclass(frozen=True)
class Trial:
    """What is shown at a time: clips of one prompt, by their random names."""

    number: int
    kind: str  # normal or trap
    prompt: str
    clips: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """What study.json holds."""

    mode: str
    seed: int
    per_rater: Total  # normal trials of one rater
    repeats: Annotated[int, Range(0, 10**9)]  # of these that are shown again
    rules: Rules
    trials: tuple[Trial, ...]

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}")
        if [trial.number for trial in self.trials] != [*range(len(self.trials))]:
            raise ValueError("trials must be numbered from 0 on")
        for trial in self.trials:
            if not trial.clips or not all(map(CLIP.fullmatch, trial.clips)):
                raise ValueError(f"trials.{trial.number}.clips are not the names of clips")
            if trial.kind not in ("normal", "trap"):
                raise ValueError(f"trials.{trial.number}.kind must be normal or trap")

    def order(self, rater: str) -> list[tuple[int, bool]]:
        """The trials of a rater, in the order in which they are shown: numbers, and whether it is a
        repetition.

        It depends on the seed and the rater alone. The trap comes somewhere after the first third,
        repetitions at the end.
        """
        digest = hashlib.sha256(f"{self.seed} {rater}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        normal = [trial.number for trial in self.trials if trial.kind == "normal"]
        traps = [trial.number for trial in self.trials if trial.kind == "trap"]
        chosen = [int(number) for number in rng.permutation(normal)[: self.per_rater]]
        repeated = [int(number) for number in rng.permutation(chosen)[: self.repeats]]
        order = [(number, False) for number in chosen]
        if traps:
            order.insert(int(rng.integers(len(order) // 3, len(order) + 1)), (int(rng.choice(traps)), False))
        return order + [(number, True) for number in repeated]

    def shown(self, rater: str, position: int) -> list[str]:
        """The clips at a position of a rater's order, from left to right. A repetition swaps the sides."""
        number, again = self.order(rater)[position]
        clips = list(self.trials[number].clips)
        digest = hashlib.sha256(f"{self.seed} {rater} {number} sides".encode()).digest()
        np.random.default_rng(int.from_bytes(digest[:8], "big")).shuffle(clips)
        return clips[::-1] if again else clips


def load(folder: Path) -> Study:
    """Read study.json; ValueError if the folder holds no study."""
    file = folder / "study.json"
    try:
        return read_table(Study, read_json(file))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no study: study.json is missing; see cogvideo judge new") from None
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


@dataclass(frozen=True)
class Key:
    """What key.json holds: the systems, which of them is real, and where each clip comes from."""

    systems: tuple[str, ...]
    real: str | None
    clips: dict[str, tuple[str, int]]  # by random name: the system, and the number of the prompt

    @classmethod
    def load(cls, folder: Path) -> "Key":
        """Read key.json; ValueError if it is missing or damaged."""
        file = folder / "key.json"
        try:
            return read_table(cls, read_json(file))
        except FileNotFoundError:
            raise ValueError(f"{folder} is no study: key.json is missing") from None
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from None

    def check(self, study: Study) -> None:
        """Raise ValueError unless it says where each clip of the study comes from."""
        origins = {*self.systems, TRAP, INTACT}
        for trial in study.trials:
            for clip in trial.clips:
                if self.clips.get(clip, ("", 0))[0] not in origins:
                    raise ValueError(
                        f"it does not say which of {', '.join(self.systems)} made the clip {clip}"
                    )


# -- preparing


@dataclass(frozen=True)
class Plan:
    """What `create` makes a study of."""

    systems: Sequence[Path]  # a folder of videos each
    mode: str = "pairs"
    prompts: Path | None = None  # a line for each video; None: the captions of the videos
    real: str | None = None  # the system whose clips are real, as a ceiling
    protocol: Protocol = field(default_factory=lambda: Protocol(frames=33, fps=8, size=192, short="refuse"))
    seed: int = 0
    per_rater: int = 24
    repeats: int = 3
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        check_range("seed", self.seed, 0, MOST_SEED)
        check_range("per_rater", self.per_rater)
        if not 0 <= self.repeats <= self.per_rater:
            raise ValueError(
                f"repeats must be from 0 to the {self.per_rater} trials of a rater; got {self.repeats}"
            )
        if not self.systems or (self.mode != "ratings" and len(self.systems) < 2):
            raise ValueError(f"{self.mode} needs two systems or more; got {len(self.systems)}")


def create(folder: Path, plan: Plan) -> Study:
    """Write a study; ValueError if the systems do not fit together, or the folder exists."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists; choose another folder, or serve the study that is there")
    names = [path.name for path in plan.systems]
    if len(set(names)) < len(names) or TRAP in names:
        raise ValueError(
            f"systems must have folders of different names, none called {TRAP}; got {', '.join(names)}"
        )
    if plan.real is not None and plan.real not in names:
        raise ValueError(f"real must be one of the systems {', '.join(names)}; got {plan.real}")
    sides = [find_items(path) for path in plan.systems]
    for name, items in zip(names, sides):
        if len(items) != len(sides[0]):
            raise ValueError(f"{name} has {len(items)} videos, but {names[0]} has {len(sides[0])}")
    prompts = _read_prompts(plan.prompts, sides[0])
    if plan.prompts is None:
        _check_captions(dict(zip(names, sides)), prompts)

    key: dict[str, tuple[str, int]] = {}
    with atomic_folder(folder) as part:
        (part / "clips").mkdir()
        shown = [_write_side(name, items, plan, part, key) for name, items in zip(names, sides)]
        traps = _write_traps(sides[names.index(plan.real) if plan.real else -1], plan, part, key)
        trials = _trials(plan.mode, prompts, shown, traps)
        study = Study(plan.mode, plan.seed, plan.per_rater, plan.repeats, plan.rules, tuple(trials))
        write_json(part / "key.json", {"real": plan.real, "systems": names, "clips": key})
        write_json(part / "study.json", asdict(study))
    return study


def _read_prompts(file: Path | None, items: Sequence[Item]) -> list[str]:
    if file is None:
        prompts = [item.caption for item in items]
    else:
        prompts = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if len(prompts) != len(items) or not all(prompts):
        where = file or "the captions of the videos"
        raise ValueError(f"{where}: {len(prompts)} prompts for {len(items)} videos; give one for each")
    return prompts


def _check_captions(sides: dict[str, list[Item]], prompts: Sequence[str]) -> None:
    """Raise ValueError if the same video of two systems has another caption."""
    for name, items in sides.items():
        for item, prompt in zip(items, prompts):
            if item.caption and item.caption != prompt:
                raise ValueError(
                    f"{item.name} shows {item.caption!r}, but the video of the first system in its place "
                    f"{prompt!r}; order the videos of {name} alike, or give prompts"
                )


def _write_side(
    system: str, items: Sequence[Item], plan: Plan, folder: Path, key: dict[str, tuple[str, int]]
) -> list[str]:
    """Write the clips of a system; return their names."""
    names = []
    for prompt, item in enumerate(items):
        names.append(_write_clip(item.frames(plan.protocol), plan, folder, key, system, prompt))
    return names


def _write_clip(
    frames: Frames, plan: Plan, folder: Path, key: dict[str, tuple[str, int]], system: str, prompt: int
) -> str:
    """Write a clip under a random name, all alike in fps, size, length and codec; return the name."""
    name = secrets.token_hex(8)
    Clip(frames, plan.protocol.fps).save(folder / "clips" / f"{name}.mp4")
    key[name] = (system, prompt)
    return name


def _write_traps(
    items: Sequence[Item], plan: Plan, folder: Path, key: dict[str, tuple[str, int]]
) -> list[tuple[int, str, str]]:
    """Prompts with an intact clip of the last system and a destroyed one: up to three."""
    rng = np.random.default_rng(plan.seed)
    traps = []
    for prompt in sorted(int(i) for i in rng.permutation(len(items))[:3]):
        frames = items[prompt].frames(plan.protocol)
        first = frames[0].astype(int)
        still = (first + rng.normal(0, 60, first.shape)).clip(0, 255).astype(np.uint8)
        noisy = np.repeat(still[None], len(frames), axis=0)  # still: flashing noise can trigger seizures
        intact = _write_clip(frames, plan, folder, key, INTACT, prompt)
        traps.append((prompt, intact, _write_clip(noisy, plan, folder, key, TRAP, prompt)))
    return traps


def _trials(
    mode: str, prompts: Sequence[str], shown: Sequence[Sequence[str]], traps: Sequence[tuple[int, str, str]]
) -> list[Trial]:
    """All trials: for each prompt each clip, each pair of systems, or all systems; then the traps."""
    rows: list[tuple[str, str, tuple[str, ...]]] = []
    for i, prompt in enumerate(prompts):
        clips = [system[i] for system in shown]
        groups: list[tuple[str, ...]] = [(clip,) for clip in clips]
        if mode == "pairs":
            groups = list(combinations(clips, 2))
        elif mode == "best":
            groups = [tuple(clips)]
        rows += [("normal", prompt, group) for group in groups]
    for number, intact, destroyed in traps:
        clips = [destroyed] if mode == "ratings" else [intact, destroyed]
        rows.append(("trap", prompts[number], tuple(clips)))
    return [Trial(number, *row) for number, row in enumerate(rows)]


# -- raters and votes


@dataclass(frozen=True)
class Rater:
    """Someone who consented."""

    rater: str
    at: float  # seconds since 1970


@dataclass(frozen=True)
class Vote:
    """One answer. In ratings `scores` has a number for each quality, or is empty; elsewhere `choice` is the
    random name of the chosen clip. Both empty: the rater cannot say."""

    rater: str
    position: int
    trial: int
    again: bool  # a repetition
    shown: tuple[str, ...]  # clips from left to right
    choice: str
    scores: dict[str, int]
    seconds: float
    at: float  # seconds since 1970


class Ballot:
    """The raters and votes of a study, read once and appended durably."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.study = load(folder)
        self.raters = {row.rater for row in _read_lines(folder / "raters.jsonl", Rater)}
        self.votes: dict[tuple[str, int], Vote] = {}
        for vote in _read_lines(folder / "votes.jsonl", Vote):
            if not self._is_of_this_study(vote):
                raise ValueError(
                    f"{folder / 'votes.jsonl'} has a vote of another study, on trial {vote.trial}"
                )
            self.votes[vote.rater, vote.position] = vote

    def _is_of_this_study(self, vote: Vote) -> bool:
        trials = self.study.trials
        if not 0 <= vote.trial < len(trials) or sorted(vote.shown) != sorted(trials[vote.trial].clips):
            return False
        if self.study.mode == "ratings":
            return not vote.choice and vote.scores.keys() in (set(), QUALITIES.keys())
        return not vote.scores and vote.choice in ("", *vote.shown)

    def join(self) -> str:
        """A new rater, who consented: a random number and no more."""
        rater = secrets.token_hex(16)
        _append(self.folder / "raters.jsonl", {"rater": rater, "at": time.time()})
        self.raters.add(rater)
        return rater

    def next_position(self, rater: str) -> int:
        """The first position without a vote; the number of positions if there is none left."""
        count = len(self.study.order(rater))
        return next((i for i in range(count) if (rater, i) not in self.votes), count)

    def vote(self, rater: str, position: int, choice: str, scores: dict[str, int], seconds: float) -> Vote:
        """Store a vote, once: a second one for the same position returns the first. ValueError if it does not
        answer what was shown there."""
        if (rater, position) in self.votes:
            return self.votes[rater, position]
        order = self.study.order(rater)
        if rater not in self.raters or not 0 <= position < len(order):
            raise ValueError("there is no such trial")
        if position != self.next_position(rater):
            raise ValueError("the trials before it have no vote yet")
        shown = self.study.shown(rater, position)
        self._check(choice, scores, shown)
        if not 0 <= seconds < 1e6:
            raise ValueError("seconds must be 0 or more")
        number, again = order[position]
        vote = Vote(rater, position, number, again, tuple(shown), choice, scores, seconds, time.time())
        _append(self.folder / "votes.jsonl", asdict(vote))
        self.votes[rater, position] = vote
        return vote

    def _check(self, choice: str, scores: dict[str, int], shown: Sequence[str]) -> None:
        if self.study.mode == "ratings":
            if choice or (scores and scores.keys() != QUALITIES.keys()):
                raise ValueError(f"a rating has a score for each of {', '.join(QUALITIES)}, or none")
            for name, score in scores.items():
                if not 1 <= score <= QUALITIES[name]:
                    raise ValueError(f"{name} must be from 1 to {QUALITIES[name]}; got {score}")
        elif scores or choice not in ("", *shown):
            raise ValueError("the choice must be one of the clips that are shown, or none")


def _append(file: Path, row: dict[str, Any]) -> None:
    """Add a line and wait until it is on the disk."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with file.open("ab") as stream:
        if stream.tell() and not _ends_with_newline(file):
            stream.write(b"\n")  # after half a line of a process that was killed
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def _ends_with_newline(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"


def _read_lines(file: Path, kind: type[T]) -> list[T]:
    """The rows of a .jsonl; half a line, of a process that was killed, is left out. ValueError, with the
    line, for a row of something else."""
    if not file.exists():
        return []
    rows = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        try:
            values = parse_json(line)
        except ValueError:
            continue
        try:
            rows.append(read_table(kind, values))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
    return rows

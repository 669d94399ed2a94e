"""What the votes of a study say: scores with intervals, agreement, and who was left out by which rule.

Intervals are 95 %, by a bootstrap that resamples raters and prompts together: votes of one rater, and votes
about one prompt, are not independent. Bradley-Terry strengths and Krippendorff's alpha are evalica's.
"""

import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from cogvideo.eval import markup
from cogvideo.eval.markup import escape
from cogvideo.eval.study import QUALITIES, TRAP, Ballot, Key, Study, Vote
from cogvideo.files import atomic_path, write_json

RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval; NaN where there are no votes."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class StudyReport:
    """The tally of a study."""

    mode: str
    systems: tuple[str, ...]
    real: str | None
    raters: int  # who voted at least once
    votes: int  # that count: of raters who were not left out, without traps and repetitions
    excluded: dict[str, str]  # raters, and the rule
    scores: dict[str, dict[str, Interval]]  # by measure, then by system
    alpha: dict[str, float]  # Krippendorff's, by measure
    self_agreement: float  # share of repeated answers that are the same; of ratings, within one point
    cannot_say: float  # share of votes
    per_prompt: tuple[dict[str, Any], ...]


def tally(folder: Path, resamples: int = RESAMPLES, seed: int = 0) -> StudyReport:
    """Read the votes of a study; ValueError if there are none."""
    ballot = Ballot(folder)
    study = ballot.study
    key = Key.load(folder)
    try:
        key.check(study)
    except ValueError as error:
        raise ValueError(f"{folder / 'key.json'} is of another study: {error}") from None
    votes = list(ballot.votes.values())
    if not votes:
        raise ValueError(f"{folder} has no votes yet")
    by_rater: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        by_rater[vote.rater].append(vote)
    excluded = {}
    for rater, own in by_rater.items():
        reason = _reason(study, key, own)
        if reason:
            excluded[rater] = reason

    counted = [vote for vote in votes if vote.rater not in excluded and _counts(study, vote)]
    rows = _rows(study, key, counted)
    measures = _measures(study)
    scores = {}
    for name, measure in measures.items():
        scores[name] = _intervals(rows, measure, key.systems, resamples, seed)
    kept = [vote for vote in votes if vote.rater not in excluded]
    return StudyReport(
        mode=study.mode,
        systems=key.systems,
        real=key.real,
        raters=len(by_rater),
        votes=len(counted),
        excluded=excluded,
        scores=scores,
        alpha=_alpha(study, counted),
        self_agreement=_self_agreement(study, kept),
        cannot_say=float(np.mean([_is_empty(vote) for vote in counted])) if counted else float("nan"),
        per_prompt=tuple(_per_prompt(study, key, rows)),
    )


def _is_empty(vote: Vote) -> bool:
    return not vote.choice and not vote.scores


def _counts(study: Study, vote: Vote) -> bool:
    """Whether a vote enters the scores: no trap, no repetition."""
    return study.trials[vote.trial].kind == "normal" and not vote.again


# -- exclusions


def _reason(study: Study, key: Key, votes: Sequence[Vote]) -> str:
    """By which rule of the study a rater is left out, or nothing."""
    rules = study.rules
    traps = [vote for vote in votes if study.trials[vote.trial].kind == "trap"]
    if rules.trap and any(_fell_for(key, vote, rules.trap_total) for vote in traps):
        return "preferred the trap"
    seconds = float(np.median([vote.seconds for vote in votes]))
    if seconds < rules.least_seconds:
        return f"took {seconds:.2f} s a vote"
    agreement = _self_agreement(study, votes)
    if agreement < rules.least_agreement:
        return f"repeated {agreement:.0%} of the answers"
    return ""


def _fell_for(key: Key, vote: Vote, trap_total: int) -> bool:
    if vote.scores:
        return vote.scores["total"] > trap_total
    return bool(vote.choice) and key.clips[vote.choice][0] == TRAP


def _self_agreement(study: Study, votes: Sequence[Vote]) -> float:
    """The share of repetitions with the same answer as before; NaN without repetitions. A comparison with NaN
    is false, so nobody is left out for it."""
    first = {(vote.rater, vote.trial): vote for vote in votes if not vote.again}
    same = []
    for vote in votes:
        before = first.get((vote.rater, vote.trial))
        if not vote.again or before is None or _is_empty(vote) or _is_empty(before):
            continue
        if study.mode == "ratings":
            same.append(abs(vote.scores["total"] - before.scores["total"]) <= 1)
        else:
            same.append(vote.choice == before.choice)
    return float(np.mean(same)) if same else float("nan")


# -- scores


@dataclass(frozen=True)
class _Row:
    """A vote as the scores need it."""

    rater: int
    prompt: int
    systems: tuple[str, ...]  # that were shown
    winner: str  # of pairs and best; "": a draw
    scores: dict[str, int]


Measure = Callable[[Sequence[_Row]], dict[str, float]]  # a number for each system


def _rows(study: Study, key: Key, votes: Sequence[Vote]) -> list[_Row]:
    raters = {rater: i for i, rater in enumerate(dict.fromkeys(vote.rater for vote in votes))}
    rows = []
    for vote in votes:
        origins = [key.clips[clip] for clip in vote.shown]
        winner = key.clips[vote.choice][0] if vote.choice else ""
        systems = tuple(system for system, _ in origins)
        rows.append(_Row(raters[vote.rater], origins[0][1], systems, winner, vote.scores))
    return rows


def _measures(study: Study) -> dict[str, Measure]:
    """The measures of a mode."""
    if study.mode == "ratings":
        return {f"{name} (1 to {highest})": _mean_of(name) for name, highest in QUALITIES.items()}
    return {"chosen (%)": _chosen, "Bradley-Terry (log strength)": _strengths()}


def _mean_of(quality: str) -> Measure:
    """The mean opinion score of a quality."""

    def measure(rows: Sequence[_Row]) -> dict[str, float]:
        values: dict[str, list[int]] = defaultdict(list)
        for row in rows:
            if row.scores:
                values[row.systems[0]].append(row.scores[quality])
        return {system: float(np.mean(scores)) for system, scores in values.items()}

    return measure


def _chosen(rows: Sequence[_Row]) -> dict[str, float]:
    """How often each system is chosen of the times that it is shown; a draw shares the vote."""
    shown: dict[str, int] = defaultdict(int)
    won: dict[str, float] = defaultdict(float)
    for row in rows:
        for system in row.systems:
            shown[system] += 1
            won[system] += (row.winner == system) if row.winner else 1 / len(row.systems)
    return {system: 100 * won[system] / count for system, count in shown.items()}


def _strengths() -> Measure:
    """Bradley-Terry strengths as logarithms, less their mean: a difference of 1.1 wins three times of
    four."""
    evalica = _evalica()

    def measure(rows: Sequence[_Row]) -> dict[str, float]:
        left = []
        right = []
        winners = []
        for row in rows:
            for one, other in combinations(row.systems, 2):
                if row.winner and row.winner not in (one, other):
                    continue  # of several: those that lost are not compared
                left.append(one)
                right.append(other)
                winner = {one: evalica.Winner.X, other: evalica.Winner.Y}.get(row.winner, evalica.Winner.Draw)
                winners.append(winner)
        if not winners:
            return {}
        found = evalica.bradley_terry(left, right, winners).scores
        logs = {str(name): float(np.log(max(score, 1e-9))) for name, score in found.items()}
        mean = float(np.mean(list(logs.values())))
        return {name: value - mean for name, value in logs.items()}

    return measure


def _evalica() -> Any:
    try:
        import evalica
    except ImportError:
        raise ValueError('the report of a study needs evalica: pip install "cogvideo[eval]"') from None
    return evalica


def _intervals(
    rows: Sequence[_Row], measure: Measure, systems: Sequence[str], resamples: int, seed: int
) -> dict[str, Interval]:
    """The measure of each system, with its interval over raters and prompts."""
    nan = float("nan")
    if not rows:
        return {system: Interval(nan, nan, nan) for system in systems}
    exact = measure(rows)
    raters = sorted({row.rater for row in rows})
    prompts = sorted({row.prompt for row in rows})
    rng = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {system: [] for system in systems}
    for _ in range(resamples):
        rater_count = np.bincount(rng.integers(len(raters), size=len(raters)), minlength=len(raters))
        prompt_count = np.bincount(rng.integers(len(prompts), size=len(prompts)), minlength=len(prompts))
        weight = dict(zip(raters, rater_count))
        times = dict(zip(prompts, prompt_count))
        drawn: list[_Row] = []
        for row in rows:
            drawn += [row] * int(weight[row.rater] * times[row.prompt])
        for system, value in measure(drawn).items():
            samples[system].append(value)

    intervals = {}
    for system in systems:
        if system not in exact:
            intervals[system] = Interval(nan, nan, nan)
            continue
        low, high = np.percentile(samples[system], [2.5, 97.5]) if samples[system] else (nan, nan)
        intervals[system] = Interval(exact[system], float(low), float(high))
    return intervals


# -- agreement


def _alpha(study: Study, votes: Sequence[Vote]) -> dict[str, float]:
    """Krippendorff's alpha of each measure: 1 where raters agree, 0 where they agree as by chance."""
    import pandas

    evalica = _evalica()
    if study.mode == "ratings":
        wanted = {f"{name} (1 to {highest})": (name, "interval") for name, highest in QUALITIES.items()}
    else:
        wanted = {"choice": ("", "nominal")}
    found = {}
    for title, (quality, distance) in wanted.items():
        table: dict[int, dict[str, float]] = defaultdict(dict)
        for vote in votes:
            if quality and vote.scores:
                table[vote.trial][vote.rater] = float(vote.scores[quality])
            elif not quality and vote.choice:
                clips = sorted(
                    study.trials[vote.trial].clips
                )  # by random names, so that no system is always first
                table[vote.trial][vote.rater] = float(clips.index(vote.choice))
        frame = pandas.DataFrame(table)
        shared = frame.loc[:, frame.notna().sum() > 1]
        if shared.empty or len(set(shared.stack())) < 2:
            found[title] = float("nan")
            continue
        found[title] = float(evalica.alpha(shared, distance=distance).alpha)
    return found


def _per_prompt(study: Study, key: Key, rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """For each prompt the mean total, or how often each system is chosen."""
    measure = _mean_of("total") if study.mode == "ratings" else _chosen
    prompts = {key.clips[trial.clips[0]][1]: trial.prompt for trial in study.trials if trial.kind == "normal"}
    table = []
    for number, prompt in sorted(prompts.items()):
        own = [row for row in rows if row.prompt == number]
        values = measure(own)
        by_system = {system: values.get(system, float("nan")) for system in key.systems}
        table.append({"prompt": prompt, "votes": len(own), **by_system})
    return table


# -- writing


def text(report: StudyReport) -> str:
    """The tally as text."""
    lines = [
        f"{report.mode}: {report.votes} votes of {report.raters} raters, {len(report.excluded)} of them "
        "left out",
        f"cannot say {report.cannot_say:.1%}, self-agreement {_share(report.self_agreement)}",
    ]
    for measure, scores in report.scores.items():
        lines += ["", measure]
        for system, interval in sorted(scores.items(), key=lambda item: -item[1].value):
            mark = "  (real)" if system == report.real else ""
            span = f"[{interval.low:.2f}, {interval.high:.2f}]"
            lines.append(f"  {system:<24}{interval.value:>8.2f}  {span}{mark}")
    lines.append("")
    lines += [f"Krippendorff's alpha, {name}: {value:.2f}" for name, value in report.alpha.items()]
    lines += [f"left out: {rater[:8]} {reason}" for rater, reason in report.excluded.items()]
    return "\n".join(lines)


def _share(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.0%}"


def save(report: StudyReport, folder: Path) -> list[Path]:
    """Write report.json, report.csv (per prompt) and report.html into the folder of the study."""
    files = [folder / f"report.{suffix}" for suffix in ("json", "csv", "html")]
    write_json(files[0], asdict(report))
    with atomic_path(files[1]) as part, part.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "votes", *report.systems])
        writer.writeheader()
        writer.writerows(report.per_prompt)
    with atomic_path(files[2]) as part:
        part.write_text(_to_html(report), encoding="utf-8")
    return files


def _to_html(report: StudyReport) -> str:
    blocks = []
    for measure, scores in report.scores.items():
        rows = []
        for system, interval in sorted(scores.items(), key=lambda item: -item[1].value):
            name = f"{system} (real)" if system == report.real else system
            rows.append([name, f"{interval.value:.2f}", f"{interval.low:.2f} to {interval.high:.2f}"])
        blocks.append(
            f"<h2>{escape(measure)}</h2>" + markup.table(["system", "score", "95 % interval"], rows)
        )
    agreement = [[name, f"{value:.2f}"] for name, value in report.alpha.items()]
    agreement.append(["answers repeated", _share(report.self_agreement)])
    agreement.append(["cannot say", f"{report.cannot_say:.1%}"])
    prompts = []
    for row in report.per_prompt:
        cells = ["-" if np.isnan(row[system]) else f"{row[system]:.1f}" for system in report.systems]
        prompts.append([row["prompt"], str(row["votes"]), *cells])
    excluded = [[rater[:8], reason] for rater, reason in report.excluded.items()] or [["nobody", ""]]
    body = "".join(
        [
            f"<h1>{escape(report.mode)}: {report.votes} votes of {report.raters} raters</h1>",
            *blocks,
            "<h2>Agreement</h2>" + markup.table(["Krippendorff's alpha", ""], agreement),
            "<h2>Prompts</h2>" + markup.table(["prompt", "votes", *report.systems], prompts),
            "<h2>Left out</h2>" + markup.table(["rater", "rule"], excluded),
        ]
    )
    return markup.page("Study", body)

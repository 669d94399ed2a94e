"""Compare two sets of clips: `evaluate` returns a `Report` of numbers, each with protocol, floor and spread.

Notable:
- Both sides have the same number of clips; the number of samples biases a Frechet distance.
- The spread is that of random halves, and the floor is the same number between halves of the reference: what
  a perfect model would get at that count.
- Temporal controls: the reference with shuffled and with frozen frames. If they score no worse than the
  floor, the network is blind to motion, and the report says so.
"""

import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvideo.data.tinyworld.own import is_world
from cogvideo.eval import metrics, tinyworld
from cogvideo.eval.clips import Item, choose, find_items, pair
from cogvideo.eval.extractors import Clip, Extractor, TinyWorldJudge, find_extractor
from cogvideo.eval.features import CONTROLS, MEASURES, Job, Row, run
from cogvideo.eval.protocol import Protocol
from cogvideo.limits import check_workers
from cogvideo.model.features import ImageFeatures, perceptual_distance
from cogvideo.model.vqvae import to_images
from cogvideo.progress import Progress

FEWEST = 256  # clips on each side, without `few`
REPEATS = 10  # random halves
SCORERS = ("tinyworld", "clip")

# What two sets of features are compared by: a function of generated and reference features to values by kind.
SetMetric = Callable[[np.ndarray, np.ndarray], dict[str, float]]
SET_METRICS: tuple[SetMetric, ...] = (
    lambda fake, true: {"frechet": metrics.frechet_distance(fake, true)},
    lambda fake, true: {"kernel": metrics.kernel_distance(fake, true)},
    lambda fake, true: asdict(metrics.neighbourhood(fake, true)),
)
DISTANCES = ("frechet", "kernel")  # by which the controls judge whether an extractor sees motion


@dataclass(frozen=True)
class Request:
    """What an evaluation compares, and how."""

    generated: str | Path
    reference: str | Path | None  # None: only measures of single clips, and what captions ask for
    protocol: Protocol = field(default_factory=Protocol)
    extractors: tuple[str, ...] = ("efficientnet-lite0",)
    weights: Mapping[str, Path] = field(default_factory=dict)
    few: bool = False
    paired: bool = False
    scorer: str | None = None
    controls: bool = True
    workers: int = 0
    ray: str | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.scorer not in (None, *SCORERS) and not is_world(self.scorer):
            raise ValueError(
                f"scorer must be one of {', '.join(SCORERS)} or a folder that cogvideo data world wrote; "
                f"got {self.scorer!r}"
            )
        check_workers(self.workers)
        if self.reference is None and self.paired:
            raise ValueError("pairs need a reference")
        if not self.extractors:
            raise ValueError("there is no extractor; choose at least one")

    @property
    def networks(self) -> list[str]:
        """The extractors, if there is something to compare, and the scorer's network."""
        names = [] if self.reference is None else [*self.extractors]
        if self.scorer is not None:
            names.append(self.scorer)
        return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Spread:
    """A number at half the count: its mean over random halves, and their standard deviation."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)))


@dataclass(frozen=True)
class SetResult:
    """One metric of two sets of clips, by one extractor."""

    metric: str  # as the literature calls it
    kind: str  # frechet, kernel ...
    extractor: str
    sha256: str
    value: float  # of all clips
    halves: Spread  # generated against reference, with half the clips
    floor: Spread  # reference against reference, with half the clips
    controls: dict[str, Spread]  # the reference with its motion destroyed, against the other half
    sees_motion: bool | None  # both controls are worse than the floor in every repeat; None: not tested


@dataclass(frozen=True)
class MeanResult:
    """The mean of a measure over clips, with its 95 % interval by bootstrap over clips."""

    measure: str
    value: float
    low: float
    high: float
    clips: int

    @classmethod
    def of(cls, measure: str, values: Sequence[float] | np.ndarray, seed: int) -> "MeanResult":
        """NaN values are left out."""
        known = np.asarray(values, np.float64)
        known = known[~np.isnan(known)]
        if not len(known):
            nan = float("nan")
            return cls(measure, nan, nan, nan, 0)
        if len(known) < 5000:
            rng = np.random.default_rng(seed)
            resampled = known[rng.integers(len(known), size=(2000, len(known)))]
            low, high = np.percentile(resampled.mean(1), [2.5, 97.5])
        else:  # the bootstrap of so many is a normal distribution
            error = 1.96 * known.std(ddof=1) / len(known) ** 0.5
            low = known.mean() - error
            high = known.mean() + error
        return cls(measure, float(known.mean()), float(low), float(high), len(known))


@dataclass(frozen=True)
class Ranked:
    """A generated clip and its rank among all: how far it is from the nearest reference clip."""

    item: Item
    distance: float
    verdict: str = ""  # of the scorer


@dataclass(frozen=True)
class Report:
    """What was found; `report.py` writes it."""

    request: Request
    counts: tuple[int, int]
    sets: tuple[SetResult, ...]
    generated: tuple[MeanResult, ...]
    reference: tuple[MeanResult, ...]
    paired: tuple[MeanResult, ...]
    adherence: tuple[MeanResult, ...]
    adherence_reference: tuple[MeanResult, ...]
    ranked: tuple[Ranked, ...]  # nearest first
    warnings: tuple[str, ...]
    command: str

    def protocol(self) -> dict[str, Any]:
        """What every number of this report depends on."""
        return {
            **self.request.protocol.to_dict(),
            "clips": list(self.counts),
            "frames chosen": "by time stamp, the nearest to start + i / fps",
            "dtype": "float32 networks, float64 statistics",
            "spread": f"{REPEATS} pairs of random halves, by the seed",
            "versions": versions(),
            "command": self.command,
        }

    def to_dict(self) -> dict[str, Any]:
        protocol = self.protocol()
        sets = []
        for result in self.sets:
            own = {"extractor": result.extractor, "sha256": result.sha256, **protocol}
            sets.append({**asdict(result), "protocol": own})

        def rows(results: Sequence[MeanResult]) -> list[dict[str, Any]]:
            return [{**asdict(result), "protocol": protocol} for result in results]

        return {
            "generated": str(self.request.generated),
            "reference": None if self.request.reference is None else str(self.request.reference),
            "sets": sets,
            "clips": {"generated": rows(self.generated), "reference": rows(self.reference)},
            "paired": rows(self.paired),
            "adherence": {
                "scorer": self.request.scorer,
                "generated": rows(self.adherence),
                "reference": rows(self.adherence_reference),
            },
            "ranked": [[entry.item.name, entry.distance, entry.verdict] for entry in self.ranked],
            "warnings": list(self.warnings),
            "protocol": protocol,
        }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("cogvideo", "torch", "numpy", "pillow", "av", "scikit-image"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def evaluate(request: Request, progress: Progress | None = None) -> Report:
    """Compare the generated clips of a request with its reference. ValueError for whatever makes the numbers
    worthless, before anything is computed if it can be known by then."""
    seed = request.protocol.seed
    metrics.flow_function()  # before any work
    generated, reference, warnings = _choose_sides(request)
    extractors = {name: find_extractor(name, request.weights) for name in request.networks}
    pairs = pair(generated, reference) if request.paired else []

    generated, rows = _compute(request, generated, "generated", warnings, progress)
    reference, real = _compute(request, reference, "reference", warnings, progress)
    _check_rows(request, generated, rows, real, warnings)
    sets: list[SetResult] = []
    if real:
        for name in request.extractors:
            sets += _set_results(extractors[name], rows, real, request)
    warnings += _blindness(sets)
    adherence, verdicts = _adherence(request, extractors, generated, rows)
    adherence_reference, _ = _adherence(request, extractors, reference, real)
    return Report(
        request=request,
        counts=(len(rows), len(real)),
        sets=tuple(sets),
        generated=_means(rows, seed),
        reference=_means(real, seed),
        paired=_paired(pairs, request.protocol, progress),
        adherence=adherence,
        adherence_reference=adherence_reference,
        ranked=_rank(request.extractors[0], generated, rows, real, verdicts),
        warnings=tuple(warnings),
        command=" ".join(["cogvideo", *sys.argv[1:]]),
    )


def _choose_sides(request: Request) -> tuple[list[Item], list[Item], list[str]]:
    """The clips of both sides, and warnings."""
    protocol = request.protocol
    generated = choose(find_items(request.generated), protocol.count, protocol.seed)
    if request.reference is None:
        return generated, [], []
    reference = choose(find_items(request.reference), protocol.count, protocol.seed)
    count = min(len(generated), len(reference))
    if len(generated) != len(reference) and protocol.short != "skip":
        raise ValueError(
            f"{len(generated)} generated and {len(reference)} reference clips: numbers of different counts "
            f"cannot be compared; give --count {count} (or less)"
        )
    if count < 4:
        raise ValueError(f"halves need 4 clips or more on a side; got {count}")
    if count >= FEWEST:
        return generated, reference, []
    if not request.few:
        raise ValueError(
            f"{count} clips on a side are too few for a trustworthy number; give {FEWEST} or more, or --few"
        )
    warning = f"{count} clips on a side are few: compare with the floor and the spread, not with papers"
    return generated, reference, [warning]


def _check_rows(
    request: Request, items: Sequence[Item], rows: Sequence[Row], real: Sequence[Row], warnings: list[str]
) -> None:
    """Raise ValueError for different counts or repeated clips; warn of copies of the reference."""
    if request.reference is not None and len(rows) != len(real):
        raise ValueError(
            f"{len(rows)} generated and {len(real)} reference clips are long enough; give --count "
            f"{min(len(rows), len(real))}"
        )
    _check_duplicates(items, rows)
    copies = {row.digest for row in rows} & {row.digest for row in real}
    if copies and not request.paired:
        warnings.append(f"{len(copies)} generated clips equal a reference clip, frame by frame")


def _blindness(sets: Sequence[SetResult]) -> list[str]:
    """A warning for each extractor whose Frechet distance does not see motion."""
    warnings = []
    for result in sets:
        if result.kind == "frechet" and result.sees_motion is False:
            warnings.append(
                f"{result.extractor} may be blind to motion: shuffled or frozen frames are not always worse"
            )
    return warnings


def _compute(
    request: Request, items: Sequence[Item], side: str, warnings: list[str], progress: Progress | None
) -> tuple[list[Item], list[Row]]:
    """The rows of a side, without clips that are too short, and their items."""
    weights = tuple(sorted(request.weights.items()))
    controls = request.controls and side == "reference"
    networks = tuple(request.networks)
    jobs = [Job(item, request.protocol, networks, weights, controls, request.cache) for item in items]

    def report(done: int) -> None:
        if progress is not None:
            progress(side, done, len(jobs))

    rows = list(run(jobs, request.workers, request.ray, report))
    kept = [(item, row) for item, row in zip(items, rows) if not row.skipped]
    short = len(rows) - len(kept)
    if short:
        warnings.append(f"{short} {side} clips were skipped because they are too short")
    return [item for item, _ in kept], [row for _, row in kept]


def _check_duplicates(items: Sequence[Item], rows: Sequence[Row]) -> None:
    """Raise ValueError if generated clips have the same frames."""
    names: dict[str, list[str]] = defaultdict(list)
    for item, row in zip(items, rows):
        names[row.digest].append(item.name)
    twins = [group for group in names.values() if len(group) > 1]
    if twins:
        raise ValueError(
            f"{len(twins)} generated clips occur more than once, such as {' and '.join(twins[0][:2])}; "
            "repeated clips spoil every distance"
        )


# -- sets of features


def _set_results(
    extractor: Extractor, rows: Sequence[Row], real: Sequence[Row], request: Request
) -> list[SetResult]:
    """All metrics of one extractor."""
    fake = _stack(rows, extractor.name, "clip")
    true = _stack(real, extractor.name, "clip")
    destroyed = {}
    if request.controls:
        destroyed = {kind: _stack(real, extractor.name, kind) for kind in CONTROLS}
    half = min(len(fake), len(true)) // 2 * fake.shape[1]  # samples
    measured = SET_METRICS if half > metrics.NEIGHBOURS else SET_METRICS[:-1]  # neighbourhoods need more
    results = []
    for metric in measured:
        results += _compare(extractor, metric, fake, true, destroyed, request.protocol.seed)
    if extractor.has_classes:
        results.append(_score_result(extractor, fake, true, request.protocol.seed))
    return results


def _stack(rows: Sequence[Row], extractor: str, kind: str) -> np.ndarray:
    """float32 [clips, rows of a clip, D]."""
    return np.stack([row.features[extractor, kind] for row in rows])


def _flat(features: np.ndarray) -> np.ndarray:
    return features.reshape(-1, features.shape[-1])


def _compare(
    extractor: Extractor,
    metric: SetMetric,
    fake: np.ndarray,
    true: np.ndarray,
    destroyed: Mapping[str, np.ndarray],
    seed: int,
) -> list[SetResult]:
    """A metric of all clips, and of random halves; a result for each of its kinds."""
    whole = metric(_flat(fake), _flat(true))
    halves = []
    floor = []
    spoilt: dict[str, list[dict[str, float]]] = {name: [] for name in destroyed}
    for repeat in range(REPEATS):
        rng = np.random.default_rng((seed, repeat))
        f1, f2 = _halves(rng, len(fake))
        t1, t2 = _halves(rng, len(true))
        first = metric(_flat(fake[f1]), _flat(true[t1]))
        second = metric(_flat(fake[f2]), _flat(true[t2]))
        halves.append({kind: (first[kind] + second[kind]) / 2 for kind in whole})
        floor.append(metric(_flat(true[t1]), _flat(true[t2])))
        for name, features in destroyed.items():
            spoilt[name].append(metric(_flat(features[t1]), _flat(true[t2])))

    results = []
    for kind, value in whole.items():
        best = [values[kind] for values in floor]
        controls = {name: [values[kind] for values in rows] for name, rows in spoilt.items()}
        sees_motion = None
        if controls and kind in DISTANCES:
            sees_motion = all(_is_worse(values, best) for values in controls.values())
        result = SetResult(
            metric=_title(kind, extractor),
            kind=kind,
            extractor=extractor.name,
            sha256=extractor.sha256,
            value=value,
            halves=Spread.of([values[kind] for values in halves]),
            floor=Spread.of(best),
            controls={name: Spread.of(values) for name, values in controls.items()},
            sees_motion=sees_motion,
        )
        results.append(result)
    return results


def _halves(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    order = rng.permutation(count)
    return order[: count // 2], order[count // 2 : count // 2 * 2]


def _title(kind: str, extractor: Extractor) -> str:
    if kind == "frechet":
        return extractor.distance
    if kind == "kernel":
        return f"kernel distance ({extractor.name})"
    return f"{kind} ({extractor.name})"


def _is_worse(values: Sequence[float], floor: Sequence[float]) -> bool:
    """Whether a control is farther than the floor in every repeat; both have the same halves there."""
    return all(value > best for value, best in zip(values, floor))


def _score_result(extractor: Extractor, fake: np.ndarray, true: np.ndarray, seed: int) -> SetResult:
    """The Inception Score, and as its floor that of the reference."""

    def score(features: np.ndarray) -> float:
        return metrics.inception_score(extractor.probabilities(torch.from_numpy(_flat(features))))

    halves = []
    floor = []
    for repeat in range(REPEATS):
        rng = np.random.default_rng((seed, repeat))
        halves.append(score(fake[_halves(rng, len(fake))[0]]))
        floor.append(score(true[_halves(rng, len(true))[0]]))
    return SetResult(
        metric=f"Inception Score ({extractor.name})",
        kind="inception score",
        extractor=extractor.name,
        sha256=extractor.sha256,
        value=score(fake),
        halves=Spread.of(halves),
        floor=Spread.of(floor),
        controls={},
        sees_motion=None,
    )


# -- single clips


def _means(rows: Sequence[Row], seed: int) -> tuple[MeanResult, ...]:
    return tuple(MeanResult.of(name, [row.measures[name] for row in rows], seed) for name in MEASURES)


def _paired(
    pairs: Sequence[tuple[Item, Item]], protocol: Protocol, progress: Progress | None
) -> tuple[MeanResult, ...]:
    """PSNR, SSIM and perceptual distance of clips of the same name, averaged over frames."""
    if not pairs:
        return ()
    net = ImageFeatures()
    values: dict[str, list[float]] = {"PSNR (dB)": [], "SSIM": [], "perceptual (efficientnet-lite0)": []}
    for done, (item, other) in enumerate(pairs, 1):
        a = to_images(item.frames(protocol))
        b = to_images(other.frames(protocol))
        with torch.inference_mode():
            distance = perceptual_distance(net, a, b)
        values["PSNR (dB)"].append(float(metrics.psnr(a, b).clamp_max(100).mean()))
        values["SSIM"].append(float(metrics.ssim(a, b).mean()))
        values["perceptual (efficientnet-lite0)"].append(float(distance.mean()))
        if progress is not None:
            progress("pairs", done, len(pairs))
    return tuple(MeanResult.of(name, row, protocol.seed) for name, row in values.items())


def _adherence(
    request: Request, extractors: Mapping[str, Extractor], items: Sequence[Item], rows: Sequence[Row]
) -> tuple[tuple[MeanResult, ...], list[str]]:
    """How well clips show what their captions say; and a verdict on each clip."""
    if request.scorer is None or not items:
        return (), []
    captions = [item.caption for item in items]
    if not all(captions):
        if all(not caption for caption in captions):
            return (), []
        missing = next(item.name for item in items if not item.caption)
        raise ValueError(f"the scorer needs a caption for each clip; {missing} has none")
    seed = request.protocol.seed
    extractor = extractors[request.scorer]
    features = torch.from_numpy(_stack(rows, extractor.name, "clip"))  # [B, rows, D]
    if isinstance(extractor, TinyWorldJudge):
        seen = extractor.seen(features[:, 0])
        right = extractor.classes.asked(captions).right(seen)
        names = (*tinyworld.HEADS, "all three")
        results = [
            MeanResult.of(f"{name} right (%)", 100 * right[:, i].numpy(), seed)
            for i, name in enumerate(names)
        ]
        return tuple(results), [_verdict(row) for row in right]
    assert isinstance(extractor, Clip)
    text = torch.cat([extractor.text_features(caption) for caption in captions])  # [B, D]
    similarity = (features * text[:, None]).sum(-1).mean(1)
    result = MeanResult.of("CLIPSIM (CLIP)", similarity.numpy(), seed)
    return (result,), [f"{value:.3f}" for value in similarity.tolist()]


def _verdict(right: Tensor) -> str:
    wrong = [name for name, value in zip(tinyworld.HEADS, right.tolist()) if value == 0]
    return f"wrong {' and '.join(wrong)}" if wrong else "right"


def _rank(
    extractor: str, items: Sequence[Item], rows: Sequence[Row], real: Sequence[Row], verdicts: Sequence[str]
) -> tuple[Ranked, ...]:
    """Generated clips by the distance of their mean features to the nearest reference clip, features scaled
    by their deviation over the reference; without a reference those that are right first."""
    if not real:
        nan = float("nan")
        entries = [Ranked(item, nan, verdict) for item, verdict in zip(items, verdicts or [""] * len(items))]
        return tuple(sorted(entries, key=lambda entry: entry.verdict != "right"))
    fake = torch.from_numpy(_stack(rows, extractor, "clip").mean(1))
    true = torch.from_numpy(_stack(real, extractor, "clip").mean(1))
    scale = true.std(0).clamp_min(1e-8)
    distance = torch.cdist(fake / scale, true / scale).amin(1)
    order = distance.argsort().tolist()
    return tuple(Ranked(items[i], float(distance[i]), verdicts[i] if verdicts else "") for i in order)

"""A report of an evaluation: a table for the terminal, JSON, and one page of HTML with plots and clips."""

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cogvideo.eval import markup
from cogvideo.eval.evaluate import MeanResult, Ranked, Report, SetResult, Spread
from cogvideo.eval.markup import escape
from cogvideo.eval.protocol import Protocol
from cogvideo.files import atomic_path, write_json
from cogvideo.video import Clip

_EXPLANATION = (
    "The floor is the same number between halves of the reference: what a perfect model would get. Shuffled "
    "and frozen are the reference with its motion destroyed; where they are no worse than the floor, the "
    "number says nothing about motion."
)
SHOWN = 6  # clips, of the best and of the worst


def table(report: Report) -> str:
    """The numbers as text, a block for each kind."""
    lines = [
        _title(report),
        f"{report.counts[0]} clips each; {_protocol_line(report.request.protocol)}",
        "",
    ]
    if report.sets:
        half = report.counts[0] // 2
        head = f"{'':<48}{'value':>12}{f'at {half} clips':>22}{f'floor at {half}':>22}"
        if report.request.controls:
            head += f"{'shuffled':>12}{'frozen':>12}"
        lines.append(head)
        lines += [_set_line(result) for result in report.sets]
    blocks = (
        (report.generated, report.reference, "single clips, 95 % interval"),
        (report.adherence, report.adherence_reference, "captions, 95 % interval"),
        (report.paired, (), "pairs, 95 % interval"),
    )
    for results, others, title in blocks:
        if results:
            lines += ["", f"{title:<48}{'generated':>28}{'reference':>28}"]
            lines += _mean_lines(results, others)
    lines += [f"warning: {warning}" for warning in report.warnings]
    return "\n".join(line.rstrip() for line in lines)


def _title(report: Report) -> str:
    request = report.request
    if request.reference is None:
        return str(request.generated)
    return f"{request.generated} against {request.reference}"


def _protocol_line(protocol: Protocol) -> str:
    crop = "middle square" if protocol.crop == "centre" else "whole frame squeezed"
    return (
        f"{protocol.frames} frames at {protocol.fps:g} fps, start {protocol.start}, {protocol.size} px, "
        f"{crop}, {protocol.filter}, {protocol.order}"
    )


def _set_line(result: SetResult) -> str:
    line = f"{result.metric:<48}{_number(result.value):>12}"
    line += f"{_spread(result.halves):>22}{_spread(result.floor):>22}"
    for spread in result.controls.values():
        line += f"{_number(spread.mean):>12}"
    return line


def _mean_lines(results: Sequence[MeanResult], others: Sequence[MeanResult]) -> list[str]:
    known = {result.measure: result for result in others}
    lines = []
    for result in results:
        other = known.get(result.measure)
        lines.append(f"{result.measure:<48}{_interval(result):>28}{_interval(other) if other else '':>28}")
    return lines


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 6)}f}"


def _spread(spread: Spread) -> str:
    return f"{_number(spread.mean)} ± {_number(spread.deviation)}"


def _interval(result: MeanResult) -> str:
    return f"{_number(result.value)} [{_number(result.low)}, {_number(result.high)}]"


def save(report: Report, path: Path) -> list[Path]:
    """Write the JSON, and the page next to it; return both paths."""
    page = path.with_suffix(".html")
    write_json(path, report.to_dict())
    with atomic_path(page) as part:
        part.write_text(to_html(report), encoding="utf-8")
    return [path, page]


# -- the page


def to_html(report: Report) -> str:
    request = report.request
    best, worst = "Nearest to the reference", "Farthest from the reference"
    if request.reference is None:
        best, worst = "Clips that are right", "Clips that are wrong"
    parts = [
        f"<h1>{escape(_title(report))}</h1>",
        f"<p>{report.counts[0]} clips each. {escape(_protocol_line(request.protocol))}.</p>",
        *(f"<p class='warning'>{escape(warning)}</p>" for warning in report.warnings),
        _set_section(report),
        _mean_section("Single clips", report.generated, report.reference),
        _mean_section("What captions ask for", report.adherence, report.adherence_reference),
        _mean_section("Pairs", report.paired, ()),
        _clip_section(best, report.ranked[:SHOWN], request.protocol),
        _clip_section(worst, report.ranked[::-1][:SHOWN], request.protocol),
        "<h2>Protocol</h2>",
        f"<pre>{escape(json.dumps(report.protocol(), indent=2, ensure_ascii=False))}</pre>",
    ]
    return markup.page(_title(report), "".join(parts))


def _set_section(report: Report) -> str:
    if not report.sets:
        return ""
    half = report.counts[0] // 2
    names = ["metric", "value", f"at {half} clips", f"floor at {half}", "shuffled", "frozen", "sees motion"]
    rows = []
    for result in report.sets:
        sees = {True: "yes", False: "no", None: "-"}[result.sees_motion]
        controls = [_number(spread.mean) for spread in result.controls.values()] or ["-", "-"]
        cells = [
            result.metric,
            _number(result.value),
            _spread(result.halves),
            _spread(result.floor),
            *controls,
            sees,
        ]
        rows.append(cells)
    plots = "".join(_bars(result) for result in report.sets if result.kind == "frechet")
    return f"<h2>Sets of clips</h2><p class='note'>{_EXPLANATION}</p>{markup.table(names, rows)}{plots}"


def _mean_section(title: str, results: Sequence[MeanResult], others: Sequence[MeanResult]) -> str:
    if not results:
        return ""
    known = {result.measure: result for result in others}
    rows = []
    for result in results:
        other = known.get(result.measure)
        rows.append(
            [result.measure, _interval(result), _interval(other) if other else "-", str(result.clips)]
        )
    names = ["mean, 95 % interval", "generated", "reference", "clips"]
    return f"<h2>{title}</h2>" + markup.table(names, rows)


def _bars(result: SetResult) -> str:
    """A Frechet distance next to its floor and its controls, as bars with their deviations."""
    bars = {"generated": result.halves, "floor": result.floor, **result.controls}
    most = max(spread.mean + spread.deviation for spread in bars.values()) or 1.0
    height = 26 * len(bars) + 8
    shapes = []
    for i, (name, spread) in enumerate(bars.items()):
        y = 6 + 26 * i
        width = 420 * max(spread.mean, 0) / most
        low = 130 + 420 * max(spread.mean - spread.deviation, 0) / most
        high = 130 + 420 * (spread.mean + spread.deviation) / most
        shapes.append(f"<text x='120' y='{y + 14}' text-anchor='end'>{escape(name)}</text>")
        shapes.append(f"<rect x='130' y='{y}' width='{width:.1f}' height='18' fill='var(--bar)'/>")
        shapes.append(f"<path d='M{low:.1f} {y + 9}H{high:.1f}' stroke='var(--mark)' stroke-width='2'/>")
        shapes.append(f"<text x='{high + 8:.1f}' y='{y + 14}'>{_number(spread.mean)}</text>")
    label = f"{result.metric}, with half of the clips"
    return (
        f"<figure><figcaption>{escape(label)}</figcaption><svg role='img' aria-label='{escape(label)}' "
        f"viewBox='0 0 680 {height}' width='100%'>{''.join(shapes)}</svg></figure>"
    )


def _clip_section(title: str, ranked: Sequence[Ranked], protocol: Protocol) -> str:
    figures = []
    for entry in ranked:
        caption = " · ".join(part for part in (entry.item.stem, entry.item.caption, entry.verdict) if part)
        image = f"<img alt='{escape(entry.item.caption or entry.item.stem)}' src='{_data(entry, protocol)}'>"
        figures.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
    return f"<h2>{title}</h2><div class='clips'>{''.join(figures)}</div>"


def _data(entry: Ranked, protocol: Protocol) -> str:
    """The frames that the networks saw, as an animation inside the page."""
    frames = entry.item.frames(protocol)
    if frames.shape[1] > 192:
        step = math.ceil(frames.shape[1] / 192)
        frames = np.ascontiguousarray(frames[:, ::step, ::step])
    with TemporaryDirectory() as folder:
        file = Path(folder) / "clip.webp"
        Clip(frames, protocol.fps).save(file)
        encoded = base64.b64encode(file.read_bytes()).decode()
    return f"data:image/webp;base64,{encoded}"

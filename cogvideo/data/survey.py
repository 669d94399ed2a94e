"""What a training would read: every video of a source, opened once, with what is wrong with it.

A clip is what a phase of a recipe cuts: so many frames at one of several fps. A video that no phase can cut
is not used; one that some phases can cut is used by these.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cogvideo.data.cut import ClipSpec, cut_clip
from cogvideo.data.videos import CaptionedVideo, Videos
from cogvideo.files import write_json
from cogvideo.progress import Progress

TILE = 96  # pixels a side of a frame on the sheet
SHOWN = 40  # videos on the sheet
NAMED = 12  # problems that are printed


@dataclass(frozen=True)
class Words:
    """How captions are read: by the model that training starts from, or by one that is trained for them."""

    length: Callable[[str], int]  # tokens of a caption, with the duration prompt
    longest: int
    unknown: Callable[[str], Sequence[str]]  # words that the model never saw


@dataclass
class Row:
    """One video."""

    name: str
    used: bool = False
    why: str = ""  # it is not used
    seconds: float = 0.0
    fps: float = 0.0
    width: int = 0
    height: int = 0
    phases: list[str] = field(default_factory=list)  # that can cut clips of it
    captions: int = 0
    tokens: int = 0  # of the longest caption
    cut: int = 0  # captions that are longer than the model reads
    unknown: list[str] = field(default_factory=list)


@dataclass
class Survey:
    rows: list[Row]
    phases: dict[str, ClipSpec]
    longest: int

    @property
    def used(self) -> list[Row]:
        return [row for row in self.rows if row.used]

    def text(self) -> str:
        """A table for the terminal."""
        used = self.used
        skipped = [row for row in self.rows if not row.used]
        lines = [f"{len(used)} videos are used, {len(skipped)} are not"]
        lines += [f"  {row.name}: {row.why}" for row in skipped[:NAMED]]
        if len(skipped) > NAMED:
            lines.append(f"  and {len(skipped) - NAMED} more, in check.json")
        if used:
            seconds = [row.seconds for row in used]
            lines.append(f"seconds   {min(seconds):.1f} to {max(seconds):.1f}, {sum(seconds):.0f} in all")
            lines.append(f"fps       {_counted(f'{row.fps:g}' for row in used)}")
            lines.append(f"pixels    {_counted(f'{row.width}x{row.height}' for row in used)}")
            tokens = [row.tokens for row in used]
            lines.append(f"captions  {sum(row.captions for row in used)}, of up to {max(tokens)} tokens")
        cut = sum(row.cut for row in used)
        if cut:
            lines.append(f"          {cut} are longer than the {self.longest} tokens that the model reads")
        unknown = Counter(word for row in used for word in row.unknown)
        if unknown:
            words = ", ".join(f"{word} ({count})" for word, count in unknown.most_common(NAMED))
            lines.append(f"unknown   {len(unknown)} words: {words}")
        for name, spec in self.phases.items():
            count = sum(name in row.phases for row in used)
            rates = ", ".join(f"{fps:g}" for fps in sorted(set(spec.fps)))
            lines.append(f"{name:<9} {count} videos have {spec.frames} frames at {rates} fps")
        return "\n".join(lines)

    def save(self, file: Path) -> None:
        write_json(file, {"rows": [asdict(row) for row in self.rows]})


def survey(
    source: Videos, phases: dict[str, ClipSpec], words: Words, progress: Progress | None = None
) -> Survey:
    """Open every video of a source; ValueError if none can be used."""
    rows = [Row(name, why=why) for name, why in source.skipped.items()]
    for index in range(source.count):
        rows.append(_row(source, index, phases, words))
        if progress is not None:
            progress("videos", index + 1, source.count)
    found = Survey(rows, phases, words.longest)
    if not found.used:
        raise ValueError(f"no video can be used\n{found.text()}")
    return found


def _row(source: Videos, index: int, phases: dict[str, ClipSpec], words: Words) -> Row:
    row = Row(source.name(index))
    try:
        video = source[index]
        _measure(row, video)
        for name, spec in phases.items():
            try:
                cut_clip(video, spec, np.random.default_rng(index))
                row.phases.append(name)
            except ValueError as error:
                row.why = str(error)
    except (ValueError, OSError) as error:
        row.why = str(error)
        return row
    row.used = bool(row.phases)
    if row.used:
        row.why = ""
    captions = video.captions
    lengths = [words.length(caption) for caption in captions]
    row.captions = len(captions)
    row.tokens = max(lengths)
    row.cut = sum(length > words.longest for length in lengths)
    row.unknown = sorted({word for caption in captions for word in words.unknown(caption)})
    return row


def _measure(row: Row, video: CaptionedVideo) -> None:
    row.seconds = round(video.seconds, 3)
    row.fps = round(video.fps, 3)
    first = video.video.frames([video.start])
    row.height, row.width = first.shape[1:3]


def _counted(values: Iterable[str]) -> str:
    """Values with how often they come, the most frequent first."""
    counts = Counter(values)
    named = [f"{value} ({count})" for value, count in counts.most_common(5)]
    return ", ".join(named) + (" ..." if len(counts) > 5 else "")


def sheet(source: Videos, found: Survey) -> Image.Image:
    """The longest clips of the first videos as training sees them: a row each, with a caption under it."""
    spec = max(found.phases.values(), key=lambda clips: clips.keep or clips.frames)
    used = {row.name for row in found.used if row.phases}
    blocks: list[Image.Image] = []
    for index in range(source.count):
        if source.name(index) not in used or len(blocks) == SHOWN:
            continue
        rng = np.random.default_rng(index)
        try:
            sample = cut_clip(source[index], spec, rng)
        except ValueError:
            continue
        frames = [Image.fromarray(frame).resize((TILE, TILE)) for frame in sample.frames[0]]
        block = Image.new("RGB", (TILE * len(frames), TILE + 16), "white")
        for i, frame in enumerate(frames):
            block.paste(frame, (i * TILE, 0))
        ImageDraw.Draw(block).text((2, TILE + 2), sample.caption[:80], fill="black")
        blocks.append(block)
    page = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), "white")
    top = 0
    for block in blocks:
        page.paste(block, (0, top))
        top += block.height
    return page

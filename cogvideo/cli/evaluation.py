"""cogvideo evaluate: two sets of videos in, a report out."""

from pathlib import Path
from typing import Any, Literal

from cogvideo.cli.parsing import Positional, Short


def evaluate(
    generated: Positional[str],
    reference: Positional[str | None] = None,
    /,
    out: Short = Path("report.json"),
    preset: str | None = None,
    extractors: tuple[str, ...] = (),
    weights: tuple[str, ...] = (),
    frames: int | None = None,
    fps: float | None = None,
    size: int | None = None,
    start: Literal["first", "middle", "random"] | None = None,
    crop: Literal["centre", "none"] | None = None,
    filter: Literal["nearest", "bilinear", "bicubic", "lanczos", "area"] | None = None,
    order: Literal["crop-resize", "resize-crop"] | None = None,
    short: Literal["refuse", "skip", "repeat"] | None = None,
    count: int | None = None,
    seed: int | None = None,
    few: bool = False,
    paired: bool = False,
    scorer: str | None = None,
    controls: bool = True,
    workers: int = 0,
    ray: str | None = None,
    cache: Path | None = None,
    quiet: bool = False,
) -> None:
    """Compare generated videos with a reference: distances, motion, captions, each with its protocol.

    Each side is a folder of videos, a .txt with a path on each line, a .csv or .jsonl with captions, or
    webdataset shards. Writes a JSON file and a page of HTML next to it. docs/evaluation.md explains the
    numbers.

    Args:
        generated: The videos to judge.
        reference: The videos to compare them with. Without: only measures of single clips and --scorer.
        out: The JSON file to write; the page gets the same name.
        preset: The protocol of a paper: tinyworld, ucf101, kinetics600, msrvtt. Other options override it.
        extractors: Networks: efficientnet-lite0, tinyworld; from files: i3d, c3d, inception, videomae, clip.
        weights: Files of networks, as in i3d=FILE.
        frames: Frames of a clip.
        fps: Frames per second at which a clip is taken, by time stamps.
        size: Pixels a side.
        start: Where a clip starts in its video.
        crop: The middle square, or none: the frame is squeezed.
        filter: How frames are resized.
        order: Whether frames are cropped or resized first.
        short: What happens to videos that are too short.
        count: Clips on both sides, chosen by the seed. Default: all, which must be as many.
        seed: Of the choice of clips and of the halves.
        few: Accept fewer than 256 clips.
        paired: Also compare videos of the same name, frame by frame.
        scorer: What judges whether clips show their captions: tinyworld, clip, or a folder that cogvideo data
            world wrote.
        controls: Test whether each network sees motion.
        workers: Processes. Default: this one.
        ray: The address of a Ray cluster that computes the features, or local.
        cache: Where features are stored. Default: ~/.cache/cogvideo/features.
        quiet: Print nothing but the table.
    """
    from cogvideo.eval import protocol as protocols
    from cogvideo.eval.evaluate import Request
    from cogvideo.eval.evaluate import evaluate as compare
    from cogvideo.eval.features import default_cache
    from cogvideo.eval.report import save, table
    from cogvideo.files import expand_user
    from cogvideo.progress import open_progress
    from cogvideo.video import check_folder

    if out.suffix != ".json":
        raise ValueError(f"--out must end in .json; got {out}")
    check_folder(out.parent)
    chosen = protocols.find_preset(preset) if preset else None
    base = chosen.protocol if chosen else protocols.Protocol()
    given: dict[str, Any] = {
        "frames": frames,
        "fps": fps,
        "size": size,
        "start": start,
        "crop": crop,
        "filter": filter,
    }
    given |= {"order": order, "short": short, "count": count, "seed": seed}
    files = {}
    for pair in weights:
        name, separator, file = pair.partition("=")
        if not separator:
            raise ValueError(f"--weights needs NAME=FILE; got {pair}")
        files[name] = expand_user(file)
    request = Request(
        generated=generated,
        reference=reference,
        protocol=protocols.changed(base, given),
        extractors=extractors or (chosen.extractors if chosen else ("efficientnet-lite0",)),
        weights=files,
        few=few,
        paired=paired,
        scorer=scorer,
        controls=controls,
        workers=workers,
        ray=ray,
        cache=default_cache() if cache is None else cache,
    )
    with open_progress(not quiet) as report_progress:
        report = compare(request, report_progress)
    print(table(report))
    for path in save(report, out):
        if not quiet:
            print(path)

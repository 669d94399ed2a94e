"""cogvideo judge new, serve and report: a blind study with people."""

from pathlib import Path
from typing import Literal

from cogvideo.cli.parsing import Positional


def judge_new(
    study: Positional[Path],
    /,
    systems: tuple[Path, ...] = (),
    prompts: Path | None = None,
    mode: Literal["pairs", "ratings", "best"] = "pairs",
    real: str | None = None,
    per_rater: int = 24,
    repeats: int = 3,
    least_seconds: float = 1.0,
    least_agreement: float = 0.0,
    frames: int = 33,
    fps: float = 8.0,
    size: int = 192,
    seed: int = 0,
) -> None:
    """Prepare a blind study of videos. docs/judge.md explains it.

    Args:
        study: The folder to write.
        systems: A folder of videos each, in the same order; the folder's name is the system's in the report.
        prompts: A text file with a line for each video. Default: the captions that the videos store.
        mode: pairs: which of two is better; best: which of all systems; ratings: four scores for each video.
        real: The system whose videos are real, as a ceiling.
        per_rater: Trials of one rater.
        repeats: Of these, how many are shown again, to see whether a rater agrees with themselves.
        least_seconds: Raters whose median answer is faster are left out.
        least_agreement: Raters who repeat a smaller share of their answers are left out.
        frames: Frames of every clip.
        fps: Frames per second of every clip.
        size: Pixels a side of every clip.
        seed: Of orders and sides.
    """
    from cogvideo.eval.protocol import Protocol
    from cogvideo.eval.study import Plan, Rules, create

    rules = Rules(least_seconds=least_seconds, least_agreement=least_agreement)
    protocol = Protocol(frames=frames, fps=fps, size=size)
    made = create(study, Plan(systems, mode, prompts, real, protocol, seed, per_rater, repeats, rules))
    print(f"{study}: {len(made.trials)} trials; start it with cogvideo judge serve {study}")


def judge_serve(study: Positional[Path], /, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve the page of a study until interrupted; votes are kept.

    Args:
        study: The folder of the study.
        host: The address to listen at; 0.0.0.0 is all of this machine's.
        port: The port.
    """
    from cogvideo.eval.study_server import serve
    from cogvideo.limits import check_range

    check_range("--port", port, 1, 65535)
    serve(study, host, port)


def judge_report(study: Positional[Path], /) -> None:
    """Tally the votes of a study; writes report.json, report.csv and report.html into its folder.

    Args:
        study: The folder of the study.
    """
    from cogvideo.eval.study_report import save, tally, text

    report = tally(study)
    print(text(report))
    for path in save(report, study):
        print(path)

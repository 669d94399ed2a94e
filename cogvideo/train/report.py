"""The report of a run: lines on the terminal, a JSONL log, the loss curve as an image."""

import json
import time
from collections import deque
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from PIL import Image, ImageDraw

from cogvideo.files import atomic_path, parse_json, read_json, writing


class Report:
    """Counts steps of one phase; `every` steps it prints and logs the averages since the last line.

    peak_clips: clips a second if the machine spent all its time on the model's operations, at full speed. The
    share of it that is reached is the model FLOPs utilisation (mfu).
    """

    def __init__(
        self,
        folder: Path,
        phase: str,
        steps: int,
        clips: int,
        every: int,
        quiet: bool = False,
        peak_clips: float | None = None,
    ):
        self.log = folder / "log.jsonl"
        self.phase = phase
        self.steps = steps
        self.clips = clips
        self.every = every
        self.quiet = quiet
        self.peak_clips = peak_clips
        self.skipped = read_skipped(folder / "skipped.json")
        self.recent: deque[dict[str, float]] = deque()
        self.began = time.perf_counter()

    def forget(self, first: int) -> None:
        """Drop the rows after step `first`, which will be repeated. Only one process calls this."""
        if self.log.exists():
            kept = [row for row in read_log(self.log) if row["step"] <= first]
            with atomic_path(self.log) as whole:
                whole.write_text("".join(f"{json.dumps(row)}\n" for row in kept))

    def step(self, step: int, lr: float, numbers: dict[str, float]) -> None:
        """Numbers of step `step` (counted from 0)."""
        self.recent.append(numbers)
        if (step + 1) % self.every and step + 1 < self.steps:
            return
        now = time.perf_counter()
        speed = len(self.recent) / (now - self.began)
        keys = dict.fromkeys(k for row in self.recent for k in row)
        means = {
            k: sum(row[k] for row in self.recent if k in row) / sum(k in row for row in self.recent)
            for k in keys
        }
        line = {
            "phase": self.phase,
            "step": step + 1,
            **means,
            "lr": lr,
            "clips_per_second": speed * self.clips,
        }
        if self.peak_clips:
            line["mfu"] = speed * self.clips / self.peak_clips
        rounded = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in line.items()}
        with writing(self.log), self.log.open("a") as log:
            log.write(json.dumps(rounded) + "\n")
        if not self.quiet:
            left = timedelta(seconds=int((self.steps - step - 1) / speed))
            words = "  ".join(f"{k} {v:.4g}" for k, v in means.items())
            mfu = f"  mfu {line['mfu']:.0%}" if "mfu" in line else ""
            pace = f"lr {lr:.2g}  {speed * self.clips:.1f} clips/s{mfu}  {left} left"
            print(f"{self.phase} {step + 1}/{self.steps}  {words}  {pace}", flush=True)
        self.recent.clear()
        self.began = now

    def skip(self, skipped: dict[str, str]) -> None:
        """Note the videos that were skipped, and why, in one file for the whole phase."""
        if skipped.keys() - self.skipped.keys():
            self.skipped |= skipped
            with atomic_path(self.log.with_name("skipped.json")) as file:
                file.write_text(json.dumps(self.skipped, indent=2, ensure_ascii=False), encoding="utf-8")

    def end(self) -> None:
        """Print how many videos were skipped."""
        if self.skipped and not self.quiet:
            name, why = next(iter(self.skipped.items()))
            print(
                f"{self.phase}: {len(self.skipped)} videos skipped, listed in "
                f"{self.log.with_name('skipped.json')}; the first is {name}: {why}",
                flush=True,
            )


def read_skipped(file: Path) -> dict[str, str]:
    """The videos that were skipped so far, and why. ValueError, with the file, if it is damaged."""
    if not file.exists():
        return {}
    skipped = read_json(file)
    if not isinstance(skipped, dict) or not all(isinstance(why, str) for why in skipped.values()):
        raise ValueError(f"{file} is no table of videos and reasons; delete it, for it is a report only")
    return skipped


def read_log(log: Path) -> list[dict[str, float]]:
    """The rows of a JSONL log, except damaged ones, as a full disk leaves them."""
    rows = []
    for line in log.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def draw_curve(log: Path, out: Path, key: str = "loss", size: tuple[int, int] = (640, 360)) -> None:
    """The numbers `key` of a JSONL log over steps, as a PNG."""
    rows = read_log(log) if log.exists() else []
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    if len(points) < 2:
        return
    left, top, right, bottom = (56, 16, 16, 28)  # margins
    width, height = size
    low = min(y for _, y in points)
    high = max(y for _, y in points)
    first = points[0][0]
    last = points[-1][0]

    def pixel(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - first) / max(last - first, 1) * (width - left - right),
            height - bottom - (y - low) / max(high - low, 1e-9) * (height - top - bottom),
        )

    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = low + share * (high - low)
        pen.line([pixel(first, y), pixel(last, y)], fill="#dddddd")
        pen.text((6, pixel(first, y)[1] - 6), f"{y:.3g}", fill="#444444")
    pen.line([pixel(x, y) for x, y in points], fill="#1f6fb4", width=2)
    pen.text((left, height - 20), f"{key}, steps {first} to {last}", fill="#444444")
    with atomic_path(out) as part:
        image.save(part)

"""Progress reporting."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]  # task, steps done, steps in all


@contextmanager
def open_progress(progress: bool | Progress) -> Iterator[Progress | None]:
    """Yield the function to report progress to: the caller's own, a bar on the terminal, or None."""
    if not isinstance(progress, bool) or not progress:
        yield progress or None
        return
    from rich import progress as rich

    with rich.Progress(
        rich.TextColumn("{task.description:<12}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    ) as bar:
        tasks: dict[str, rich.TaskID] = {}

        def report(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bar.add_task(task, total=total)
            bar.update(tasks[task], completed=done)

        yield report

"""How far long work has come, told to whoever wants to know."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]  # what is being made, done, total


@contextmanager
def telling(progress: bool | Progress) -> Iterator[Progress | None]:
    """Where progress is told: the caller's own function, a bar on the terminal, or nowhere."""
    if not isinstance(progress, bool) or not progress:
        yield progress or None
        return
    from rich import progress as rich

    with rich.Progress(
        rich.TextColumn("{task.description:<12}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
    ) as bar:
        tasks: dict[str, rich.TaskID] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield told

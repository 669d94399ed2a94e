"""Signals that end a command. What is half finished is removed on the way out, and the last line says what is
left to do."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
RESUMED = {
    "train": "the same command resumes at the last save",
    "generate": "finished videos are kept, and with --keep the same command resumes",
    "evaluate": "what was computed is kept; the same command uses it",
    "data tokenize": "finished shards are kept; the same command writes the others",
    "data world": "the same command resumes",
    "convert": "finished checkpoints are kept; the same command converts the others",
}


class Stopped(BaseException):
    """A signal came that ends the command."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def exit_on_signals() -> None:
    """Let signals end this process at once: it has nothing to clean up."""
    for number in _ours():
        signal.signal(number, _exit)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise Stopped in the body where a signal would end the process. One that is ignored, as SIGHUP is by
    nohup, stays ignored."""
    usual = {number: signal.signal(number, _stop) for number in _ours()}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def say_stopped(number: int, arguments: list[str]) -> int:
    """Print what is left of a command with these arguments; return its exit code."""
    words = " ".join(arguments[:2])
    advice = [text for command, text in RESUMED.items() if words.startswith(command)]
    print("; ".join([f"cogvideo: stopped by {signal.Signals(number).name}", *advice]), file=sys.stderr)
    return 128 + number


def _ours() -> list[signal.Signals]:
    """The signals whose handlers are Python's own, or `_exit`."""
    if threading.current_thread() is not threading.main_thread():
        return []
    numbers = [signal.Signals[name] for name in NAMES if name in signal.Signals.__members__]
    replaced = (signal.SIG_DFL, signal.default_int_handler, _exit)
    return [number for number in numbers if signal.getsignal(number) in replaced]


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped(number)


def _exit(number: int, _: FrameType | None) -> None:
    os._exit(say_stopped(number, sys.argv[1:]))

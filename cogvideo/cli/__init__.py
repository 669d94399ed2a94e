"""The command line: `cogvideo generate | train | convert | push | estimate | models | evaluate | judge |
data | serve | worker`.

parsing       arguments to a command with its options
generation    generate
training      train, and estimate
folders       models, push, convert
evaluation    evaluate
studies       judge new, serve, report
datasets      data check, tokenize, world
serving       serve, worker

Each command imports what it needs inside, so that `--help` answers at once. What a user can get wrong raises
ValueError or OSError somewhere below and ends here as one line and exit code 2; a signal ends in one line as
well (`stopping.py`).
"""

import os
import signal
import sys
from collections.abc import Callable

from cogvideo import __version__
from cogvideo.cli.datasets import data_check, data_tokenize, data_world
from cogvideo.cli.evaluation import evaluate
from cogvideo.cli.folders import convert, models, push
from cogvideo.cli.generation import generate
from cogvideo.cli.parsing import Command
from cogvideo.cli.parsing import parse as parse_arguments
from cogvideo.cli.serving import serve, worker
from cogvideo.cli.studies import judge_new, judge_report, judge_serve
from cogvideo.cli.training import estimate, train
from cogvideo.stopping import Stopped, say_stopped, stopped_by_signals

LONGEST_ERROR = 900  # characters; of a longer one the middle is left out


def judge() -> None:
    """Ask people, blindly: cogvideo judge new, serve, report."""
    raise ValueError(f"give one of {', '.join(GROUPS['judge'])} after cogvideo judge")


def data() -> None:
    """Prepare data before training: cogvideo data check, tokenize, world."""
    raise ValueError(f"give one of {', '.join(GROUPS['data'])} after cogvideo data")


COMMANDS: dict[str, Command] = {
    "generate": generate,
    "train": train,
    "convert": convert,
    "push": push,
    "estimate": estimate,
    "models": models,
    "evaluate": evaluate,
    "judge": judge,
    "data": data,
    "serve": serve,
    "worker": worker,
}
GROUPS: dict[str, dict[str, Command]] = {
    "data": {"check": data_check, "tokenize": data_tokenize, "world": data_world},
    "judge": {"new": judge_new, "serve": judge_serve, "report": judge_report},
}


def parse(arguments: list[str]) -> Callable[[], None]:
    """Return the command with its arguments, to be called; ValueError, as one line, if they are wrong."""
    return parse_arguments(arguments, COMMANDS, GROUPS)


def main() -> None:
    """Run the command of `sys.argv`; exit with 2 after an error, with 128 + its number after a signal."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(f"cogvideo {__version__}")
        return
    try:
        with stopped_by_signals():
            parse(arguments)()
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # as of SIGPIPE, which Windows does not know
    except (ValueError, OSError) as error:
        sys.exit(_complain(str(error)))
    except MemoryError as error:
        sys.exit(_complain(f"the memory does not suffice {error}"))
    except KeyboardInterrupt:
        sys.exit(say_stopped(signal.SIGINT, arguments))
    except Stopped as stopped:
        sys.exit(say_stopped(stopped.number, arguments))


def _complain(error: str) -> int:
    """Print an error as one line, without what would command a terminal; return the exit code."""
    line = " ".join(error.split())
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    if len(line) > LONGEST_ERROR:
        line = f"{line[: LONGEST_ERROR // 2]} ... {line[-LONGEST_ERROR // 3 :]}"
    print(f"cogvideo: {line}", file=sys.stderr)
    return 2

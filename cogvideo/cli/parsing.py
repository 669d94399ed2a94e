"""Arguments to a command with its options. This is the one file that knows tyro."""

import io
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial, wraps
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Fixed, Positional, Suppress, arg

__all__ = ["Command", "Fields", "Positional", "Short", "parse"]

Command = Callable[..., None]
Short = Annotated[Path, arg(aliases=["-o"])]
Fields = Suppress[Fixed[dict[str, str] | None]]  # of phases, by "PHASE.FIELD"


def parse(
    arguments: list[str], commands: dict[str, Command], groups: dict[str, dict[str, Command]]
) -> Callable[[], None]:
    """Return the command with its arguments, to be called. Raise ValueError, as one line, for errors that
    tyro prints in a box. A command of a group is two words."""
    training = arguments[:1] in (["train"], ["estimate"])
    fields: dict[str, str] = {}
    if training:
        fields, arguments = _take_fields(arguments)
    program = "cogvideo"
    if len(arguments) > 1 and arguments[0] in groups:
        commands = groups[arguments[0]]
        program = f"cogvideo {arguments[0]}"
        arguments = arguments[1:]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        raise ValueError(f"{program} has no command {arguments[0]!r}; choose one of {', '.join(commands)}")
    output = io.StringIO()
    try:
        with redirect_stderr(output):
            command = tyro.extras.subcommand_cli_from_dict(
                {name: _deferred(command) for name, command in commands.items()},
                prog=program,
                description="Text to video by the method of CogVideo.",
                args=arguments,
            )
            return partial(command, fields=fields) if training else command
    except SystemExit as exit:
        if not exit.code:  # help was asked for
            raise
        lines = [line.strip("│─ ") for line in output.getvalue().splitlines() if line[:1] not in "╭╰"]
        raise ValueError(" ".join(lines)) from None


def _deferred(command: Command) -> Callable[..., Callable[[], None]]:
    """A command with the options and the help of `command` that returns the call instead of making it."""
    return wraps(command)(lambda *args, **options: partial(command, *args, **options))


def _take_fields(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split arguments into `--PHASE.FIELD VALUE`, as {"PHASE.FIELD": "VALUE"}, and the rest."""
    fields = {}
    rest = []
    remaining = iter(arguments)
    for argument in remaining:
        match = re.fullmatch(r"--(\w+(?:\.\w+)+)(?:=(.*))?", argument)
        if match is None:
            rest.append(argument)
            continue
        value = match[2] if match[2] is not None else next(remaining, None)
        if value is None:
            raise ValueError(f"{argument} needs a value")
        fields[match[1]] = value
    return fields, rest

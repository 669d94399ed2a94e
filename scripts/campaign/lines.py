"""Command lines that work, and what is put in the place of an option, a prompt or a variable."""

import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cogvideo import cli
from cogvideo.train import recipes
from scripts.campaign.case import Case

PROMPT = "a dog runs to the right"
WORKING = {  # command: arguments with which it works, those that are not options first
    "generate": [PROMPT, "--model tiny --num-frames 5 --seed 1 --out out/a.png --quiet"],
    "train": ["tiny", "--out out/run --data tinyworld"],
    "estimate": ["tiny", ""],
    "models": ["tiny", ""],
    "push": ["tiny-bad", "owner/name", ""],
    "convert": ["sat", "checkpoint", "out/model", "--codes 20"],
    "evaluate": [
        "videos",
        "others",
        "--out out/report.json --few --cache out/cache --frames 3 --fps 2 --size 32 --no-controls --quiet",
    ],
    "judge new": ["out/new", "--systems videos others --frames 3 --fps 2 --size 32"],
    "judge serve": ["study", "--port 8123"],
    "judge report": ["out/study", ""],
    "data check": ["videos", "--out out/check --quiet"],
    "data tokenize": ["videos", "--out out/codes --quiet"],
    "data world": ["art", "--out out/world --held-out 0 --judge-steps 0 --quiet"],
    "serve": ["--models tiny --data out/data --workers 0 --port 8123"],
    "worker": ["--models tiny --data out/data"],
}
PUSHED = {"tiny-bad/README.md": b"---\n---\n"}  # its folder is written to
OUTPUTS = {"out", "keep", "data", "cache", "results", "database", "study"}  # where files are written
OTHERS = ("fields", "ray", "slices")  # fields are cases of their own; the others look for other machines

NEVER = ("nan", "inf", "-inf", "1e999", "abc", "", " ", "1,5", "0x10", "--", "9" * 5000, "1/2")
INTEGERS = ("0", "-1", "1", "2", "3", "7", "1000000", "1000000000", "9" * 20, "-" + "9" * 20, "9" * 400)
FLOATS = ("0", "-0.0", "-1", "1e-300", "1e300", "0.5", "1", "9" * 300, "1e-9", "1000000000")
TEXTS = (
    "",
    " ",
    "nosuch",
    "tiny",
    "./nowhere",
    "/proc/nowhere/at/all",
    "a/b/c",
    "owner/name",
    "owner/name@",
    "~nosuchuser/x",
    "../tmp",
    ".",
    "videos",
    "prompts.txt",
    "pipe",
    "/dev/zero",
    "/dev/null",
    "/dev/full",
    "/proc/nowhere/a.mp4",
    "/proc/self/mem",
    "x" * 300,
    "x/" * 3000,
    "\udcff\udcfe",
    "\ud800",
    "\x1b[31m",
    "a\nb",
    "-1",
    "-",
    "--",
    "日本",
    "🐕",
    "nan",
    "a:b:c",
    "a=b",
    "=",
    ":0.5",
    "out/lora:nan",
    "out/lora:1e999",
    "tiny:inf",
    "*",
    "[",
    "{}",
    "%s%n",
    "http://127.0.0.1:1/x",
    "sqlite:///",
    "postgresql://",
    "nosuch://x",
    "hpu",
    "cuda",
    "cuda:99",
    "mps",
    "meta",
    "xla",
    "privateuseone",
    "cpu:7",
    "1x2",
    "0x0",
    "99999x99999",
    "9x9x9x9",
)
WRITTEN = (  # as outputs
    "",
    ".",
    "out",
    "out/a",
    "out/a.avi",
    "out/.png",
    "out/a/b/c.png",
    "/proc/nowhere/a.png",
    "/dev/full",
    "/dev/null",
    "videos/0.mp4",
    "prompts.txt",
    "prompts.txt/a.png",
    "out/" + "x" * 300 + ".png",
    "out/\udcff.png",
    "out/a\nb.png",
    "~nosuchuser/x",
    "sqlite:///out/x",
    "nosuch://x",
    "memory://x",
)
PROMPTS = (
    "",
    " ",
    "\n",
    "\t\r\n\x0b",
    "\x01\x02\x03",
    "\x7f\x1b[2J",
    "\udcff\udcfe a dog",
    "a dog \ud800",
    "\ufeff",
    "\u200b",
    "\u202e dog",
    "a" * 5000,
    "dog " * 300_000,
    "狗" * 100_000,
    "<pad>",
    "<start_of_image> a dog",
    "<n>" * 50,
    "4.0秒<n>a dog",
    "{prompt}",
    "{seconds:.999999999f}",
    "%s",
    "--seed",
    "🐕" * 20,
    "é" * 40,
    "a\u0301" * 40,
    "\u2581" * 10,
    "a dog runs\x00",
    "ﷺ" * 1000,
)
FIELDS = (
    "steps", "batch", "lr", "epochs", "warmup", "decay", "weight_decay", "clip", "drop", "reuse",
    "crop_share",
    "perturb", "corrupt", "resample", "object_weight", "adversary", "optimizer", "schedule", "precision",
    "loss.perceptual", "loss.temporal", "loss.network", "betas", "clips", "nosuch", "", "name", "loss",
)  # fmt: skip
VARIABLES = (
    "COGVIDEO_CACHE",
    "COGVIDEO_EVAL",
    "COGVIDEO_API_KEYS",
    "HOME",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "TMPDIR",
    "COLUMNS",
    "LANG",
    "TERM",
    "HF_TOKEN",
)


@dataclass(frozen=True)
class Option:
    """An option of a command: its name in Python, and its type without None."""

    name: str
    type: Any

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def names(self) -> list[str]:
        """How an error may name it."""
        return [self.name, self.name.replace("_", "-"), self.name.rpartition("_")[2]]


def function_of(command: str) -> Callable[..., None]:
    first, _, second = command.partition(" ")
    return cli.GROUPS[first][second] if second else cli.COMMANDS[first]


def options_of(command: str) -> Iterator[Option]:
    """Its options that take a value."""
    hints = get_type_hints(function_of(command), include_extras=False)
    for name, parameter in inspect.signature(function_of(command)).parameters.items():
        kind = hints[name]
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(inner for inner in get_args(kind) if inner is not type(None))
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and kind is not bool and name not in OTHERS:
            yield Option(name, kind)


def working(command: str, without: str = "") -> list[str]:
    """The arguments with which a command works, but for an option."""
    *positional, options = WORKING[command]
    words = options.split()
    if without in words:
        first = words.index(without)
        last = next((i for i in range(first + 1, len(words)) if words[i].startswith("--")), len(words))
        del words[first:last]
    return [*command.split(), *positional, *words]


def _bad_value(option: Option, random: Random) -> tuple[str, bool]:
    """A value, and whether it is wrong in any case."""
    if option.type in (int, float):
        if random.random() < 0.4:
            return random.choice(NEVER), True
        values = INTEGERS if option.type is int else (*INTEGERS, *FLOATS)
        value = random.choice(values)
        return value, False
    if get_origin(option.type) is Literal:
        return random.choice(TEXTS), True
    if option.name in OUTPUTS and random.random() < 0.6:
        return random.choice(WRITTEN), False
    return random.choice(TEXTS), False


def option_case(ground: Path, random: Random) -> Case:
    """A command with one bad option, sometimes several."""
    command = random.choice([*WORKING])
    options = list(options_of(command))
    if not options:
        return positional_case(ground, random)
    chosen = random.sample(options, min(len(options), random.choice((1, 1, 1, 1, 2, 3))))
    arguments = working(command, chosen[0].flag)
    names: list[str] = []
    wrong = False
    for option in chosen:
        value, never = _bad_value(option, random)
        arguments += [f"{option.flag}={value}"] if random.random() < 0.3 else [option.flag, value]
        wrong = wrong or never
        names += [*option.names, *_shown(value)]
    if command == "push":  # whose prompt is "the text", and that knows nobody here
        names = []
    elsewhere = command == "push" or any(option.name in OUTPUTS for option in chosen)
    return Case(arguments, names, wrong, PUSHED if command == "push" else {}, writes_elsewhere=elsewhere)


def _shown(value: str) -> list[str]:
    """How an error may show a value."""
    shown = [value, str(Path(value)), ascii(value)[1:-1]]
    shown += [str(Path(value).parent)] if "/" in value[1:] else []
    return [text[:30] for text in shown if text]


def positional_case(ground: Path, random: Random) -> Case:
    """A command with a bad argument that is no option, or with too many or too few."""
    command = random.choice([command for command in WORKING if len(WORKING[command]) > 1])
    words = command.split()
    arguments = working(command)
    place = len(words) + random.randrange(len(WORKING[command]) - 1)
    value = random.choice(TEXTS if random.random() < 0.7 else WRITTEN)
    way = random.random()
    if way < 0.8:
        arguments[place] = value
    elif way < 0.9:
        arguments.insert(place, value)
    else:
        del arguments[place]
    return Case(arguments, files=PUSHED if command == "push" else {}, writes_elsewhere=True)


def field_case(ground: Path, random: Random) -> Case:
    """A field of a phase, of a training or its estimate."""
    name = random.choice(("tiny", "direct-tiny"))  # which have the sizes of the models here
    phases = [phase.name for phase in recipes.RECIPES[name].phases]
    phase = random.choice(phases) if random.random() < 0.95 else random.choice(("", "nosuch", "a.b"))
    what = random.choice(FIELDS)
    never = random.random() < 0.3
    value = random.choice(NEVER if never else (*INTEGERS, *FLOATS, *TEXTS[:8]))
    numeric = what not in ("optimizer", "schedule", "precision", "loss.network")
    key = f"--{phase}.{what}"
    start: list[str] = random.choice((
        ["train", name, "--out", "out/run", "--phases", phase],
        ["train", name, "--out", "out/run"],
        ["estimate", "--train", name],
        ["estimate", "--train", name, "--mesh", "1x1x1"],
    ))  # fmt: skip
    given = [key, value] if random.random() < 0.5 else [f"{key}={value}"]
    names = [phase.partition(".")[0], what] if phase and what else []
    return Case([*start, *given], names, wrong=never and numeric)


def prompt_case(ground: Path, random: Random) -> Case:
    """A bad prompt, or a file of prompts."""
    model = random.choice(("tiny", "direct-tiny"))
    prompt = "".join(random.choice(PROMPTS) for _ in range(random.choice((1, 1, 1, 2, 4))))
    if random.random() < 0.4:
        prompt = "".join(
            chr(random.choice((random.randrange(256), random.randrange(0x11000)))) for _ in range(20)
        )
    end = ["--model", model, "--out", "out/a.png", "--seed", "1", "--quiet"]
    end += ["--num-frames", "5"] if model == "tiny" else []
    way = random.random()
    if way < 0.6:
        return Case(["generate", prompt.replace("\0", ""), *end])
    if way < 0.9:
        encoding = random.choice(("utf-8", "utf-8", "utf-16", "latin-1", "utf-32", "utf-7"))
        data = prompt.encode(encoding, "replace")
        if random.random() < 0.3:
            data = random.randbytes(random.choice((1, 20, 5000)))
        return Case(["generate", "--prompts", "bad.txt", *end], files={"bad.txt": data}, names=["bad.txt"])
    arguments = [*working("push"), "--prompt", prompt.replace("\0", "")]
    return Case(arguments, files=PUSHED, writes_elsewhere=True)


def environment_case(ground: Path, random: Random) -> Case:
    """A command that works, with strange variables."""
    command = random.choice([*WORKING])
    environment = {}
    for name in random.sample(VARIABLES, random.choice((1, 1, 2))):
        value = random.choice((*TEXTS, *INTEGERS[:6], "9" * 400))
        environment[name] = value.encode(
            "utf-8", "surrogateescape" if "\udcff" in value else "replace"
        ).decode("utf-8", "surrogateescape")
    files = PUSHED if command == "push" else {}
    return Case(working(command), files=files, environment=environment, writes_elsewhere=True)


KINDS: dict[str, Callable[[Path, Random], Case]] = {
    "option": option_case,
    "argument": positional_case,
    "field": field_case,
    "prompt": prompt_case,
    "environment": environment_case,
}

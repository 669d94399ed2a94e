"""What README.md and docs/*.md show is there: commands that parse, benchmarks, files. `scripts/commands.py`
runs the commands."""

import importlib.util
import re
import shlex

import pytest

from cogvideo import cli
from scripts import commands

EXAMPLE = """
Say `cogvideo train`, then `cogvideo models
tiny`, not `--seed`; `python -m here --steps 2` is

    cogvideo generate "a dog runs"   a note
    a drawing of cogvideo

```python
first = 1
```
    torchrun --nproc 2 -m cogvideo train

```bash
cogvideo models tiny
other
```

```python
second = first
```
"""


def test_commands_are_found_in_their_order():
    assert commands.commands_of(EXAMPLE) == [
        "cogvideo models tiny",
        "python -m here --steps 2",
        'cogvideo generate "a dog runs"',
        "torchrun --nproc 2 -m cogvideo train",
    ]
    assert commands.names_of(EXAMPLE) == ["train"]
    assert commands.program_of(EXAMPLE) == "first = 1\n\nsecond = first"


def test_every_row_of_the_table_is_shown_and_can_be_run():
    tasks = list(commands.plan())  # ValueError for a row of no use
    assert len(tasks) > 40 and len({task.shown for task in tasks}) == len(tasks)
    by_default = [task for task in tasks if task.shown not in commands.SHORTENED]
    assert {task.run.split()[1] for task in by_default if task.shorter.size == "nano"} == {
        "train",
        "generate",
        "estimate",
    }


def test_a_row_of_no_use_is_an_error(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(commands.SHORTENED, "cogvideo gone now", commands.nano())
        with pytest.raises(ValueError, match="no document shows cogvideo gone now; take it out"):
            list(commands.plan())
    with pytest.raises(ValueError, match="'--steps' is not in 'cogvideo models tiny'"):
        commands.nano(("--steps", "")).apply("cogvideo models tiny")


def test_long_training_is_shortened_by_itself():
    shorter = commands.usual(shown := "cogvideo train tiny --image.steps 20000 --image.batch 64")
    assert shorter.apply(shown) == "cogvideo train tiny --image.steps 4 --image.batch 4"
    assert shorter.size == "nano" and commands.usual("cogvideo models tiny") == commands.WHOLE


def test_what_is_run_instead_is_told():
    shorter = commands.nano(("20000", "4"), more="--out runs/a")
    shown = "cogvideo train tiny --image.steps 20000"
    told = str(commands.Task("README.md", shown, shorter.apply(shown), shorter))
    assert told.startswith(f"README.md: {shown}\n")
    assert "run as: cogvideo train tiny --image.steps 4 --out runs/a, recipes of 2 steps" in told


@pytest.mark.parametrize("document", commands.documents(), ids=lambda path: path.name)
def test_commands_parse_and_programs_are_there(document):
    """Options have these names, benchmarks and pages are where they are said to be."""
    text = document.read_text(encoding="utf-8")
    assert set(commands.names_of(text)) <= set(cli.COMMANDS)
    for command in commands.commands_of(text):
        for part in command.split(" && "):
            words = shlex.split(part)
            if "cogvideo" in words:
                cli.parse(words[words.index("cogvideo") + 1 :])
            elif words[:2] == ["python", "-m"]:
                assert importlib.util.find_spec(words[2]), part
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / link).exists(), link

"""A short campaign of bad input finds nothing; and it would find what it looks for."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from cogvideo import cli
from scripts.campaign import inputs
from scripts.campaign.case import Case
from scripts.campaign.ground import Begun

ROOT = Path(__file__).parent.parent
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux")


@LINUX
def test_a_short_campaign_flags_nothing(tmp_path):
    command = [sys.executable, "-m", "scripts.campaign.inputs", "--cases", "32", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("none") == len(inputs.KINDS) and not any(tmp_path.iterdir())


CASES = {  # flag: what the command does
    "traceback": "raise KeyError('a traceback')",
    "exit": "sys.exit(1)",
    "lines": "sys.exit(print('cogvideo: two\\nlines of option', file=sys.stderr) or 2)",
    "unnamed": "sys.exit(print('cogvideo: it is wrong', file=sys.stderr) or 2)",
    "accepted": "raise Begun",
    "memory": "bytearray(inputs.MEMORY)",
    "crash": "os.kill(os.getpid(), 9)",
    "outside": "Path('elsewhere').touch()",
    "code": "Path('canary').touch()",
    "noise": "print('UserWarning', file=sys.stderr)",
}


@LINUX
def test_every_flag_can_be_raised(tmp_path, monkeypatch, capsys):
    """Cases whose command is one of CASES, run by the real machinery on an empty ground."""
    names = [*CASES]

    def make(ground, random):
        return Case([random.choice(names)], ["option"], wrong=True)

    def main():
        scope = {"sys": sys, "os": os, "Path": Path, "inputs": inputs, "Begun": Begun}
        exec(CASES[sys.argv[1]], scope)

    monkeypatch.setattr(cli, "main", main)
    monkeypatch.setattr(inputs, "stop_before_work", lambda ground: None)
    monkeypatch.setitem(inputs.KINDS, "bad", make)
    ground = tmp_path / "ground"
    (ground / "study").mkdir(parents=True)
    root = tmp_path / "root"
    root.mkdir()
    found = inputs.run_kind(ground, "bad", 0, 60, root, tmp_path / "out")

    stored = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*/case.json")]
    assert len(stored) == 60
    for row in stored:
        assert row["case"]["arguments"][0] in row["flags"], row
    assert found == Counter(flag for row in stored for flag in row["flags"])
    assert {*found} == {*CASES}


@LINUX
def test_what_never_ends_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "main", signal.pause)
    monkeypatch.setattr(inputs, "stop_before_work", lambda ground: None)
    monkeypatch.setitem(inputs.KINDS, "bad", lambda ground, random: Case(["models"]))
    monkeypatch.setattr(inputs, "SECONDS", 0.1)
    monkeypatch.setattr(inputs, "STARTING", 1.0)
    (tmp_path / "ground" / "study").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    found = inputs.run_kind(tmp_path / "ground", "bad", 0, 2, tmp_path / "root", tmp_path / "out")
    assert found == {"hang": 2}


def test_a_case_survives_being_stored():
    case = Case(["a", "\udcff"], ["b"], True, {"m/config.json": b"\xff\0"}, {"HOME": "x"}, True)
    assert Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case


def test_the_same_seed_gives_the_same_cases(tmp_path):
    for kind in ("option", "argument", "field", "prompt", "environment"):
        cases = [inputs.make_case(tmp_path, kind, 3, number) for number in range(50)]
        assert cases == [inputs.make_case(tmp_path, kind, 3, number) for number in range(50)]
        assert cases != [inputs.make_case(tmp_path, kind, 4, number) for number in range(50)]

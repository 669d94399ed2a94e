"""A short campaign of damaged files finds nothing; and it would find what it looks for."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from scripts.campaign import files
from scripts.campaign.corpus import KINDS, Kind
from scripts.campaign.damage import CALLS, TARGETS

ROOT = Path(__file__).parent.parent
SLOW = {"icetk", "study", "request"}  # whose examples take seconds


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux")
def test_a_short_campaign_flags_nothing(tmp_path):
    kinds = ",".join(kind for kind in KINDS if kind not in SLOW)
    command = [sys.executable, "-m", "scripts.campaign.files", "--cases", "420", "--kinds", kinds]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("none") == len(KINDS) - len(SLOW) and not any(tmp_path.iterdir())


def _write_example(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "a.txt").write_text("good")


def _read_badly(folder: Path, out: Path) -> None:
    """All that must not happen, by the content of the file."""
    path = folder / "a.txt"
    if not path.is_file() or path.is_symlink():
        return
    data = path.read_bytes()
    harm = sum(data) % 8
    if harm == 0:
        raise KeyError("a traceback")
    if harm == 1:
        raise ValueError("no name")
    if harm == 2:
        Path("canary").touch()
    if harm == 3:
        path.write_bytes(data + b"x")
    if harm == 4:
        os.write(2, b"a warning")
    if harm == 5:
        bytearray(files.MEMORY)
    if harm == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError(f"{path} is bad")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux")
def test_every_flag_can_be_raised(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(files.KINDS, "bad", Kind(_write_example, _read_badly))
    found = files.campaign(["bad"], 40, 0, tmp_path)["bad"]
    assert found.keys() == {"traceback", "unnamed", "code", "outside", "noise", "memory", "crash"}
    stored = [json.loads((folder / "case.json").read_text()) for folder in tmp_path.iterdir()]
    assert Counter(flag for row in stored for flag in row["flags"]) == found
    folder = next(
        folder for folder in tmp_path.iterdir() if "a traceback" in (folder / "case.json").read_text()
    )
    assert files.replay(folder) == ["traceback"]
    assert "KeyError: 'a traceback'" in capsys.readouterr().out


def test_what_never_ends_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(files.KINDS, "bad", Kind(_write_example, lambda folder, out: signal.pause()))
    monkeypatch.setattr(files, "SECONDS", 0.1)
    monkeypatch.setattr(files, "STARTING", 1.0)
    assert files.campaign(["bad"], 2, 0, tmp_path)["bad"] == {"hang": 2}


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_no_way_to_call_runs_code(tmp_path, monkeypatch, number):
    """Every opcode that calls something, with everything that would leave a trace."""
    from cogvideo.convert.sat import read_states

    monkeypatch.chdir(tmp_path)
    for target in TARGETS:
        (tmp_path / "a.pt").write_bytes(CALLS[number](*target))
        with pytest.raises(ValueError, match=r"a\.pt is refused"):
            read_states(tmp_path / "a.pt")
        assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]

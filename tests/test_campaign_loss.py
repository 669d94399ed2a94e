"""A short campaign against loss finds nothing; and it would find what it looks for."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from scripts.campaign import loss
from scripts.campaign.loss import Told, Usual, Work

ROOT = Path(__file__).parent.parent
LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are told by Linux")


@LINUX
def test_a_short_campaign_flags_nothing(tmp_path):
    command = [sys.executable, "-m", "scripts.campaign.loss", "--works", "convert", "--cases", "4"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + "".join(file.read_text() for file in tmp_path.iterdir())
    assert done.stdout.count("none") == 1


class Small(loss.Stage):
    """A stage whose commands are programs in Python."""

    def __init__(self, folder: Path):
        self.cwd = folder
        self.environment = dict(os.environ)

    def start(self, work: Work, last: int = 0) -> loss.Running:
        return self.run([sys.executable, "-c", work.command])


HALF = """
import time
with open("out/a.json", "w") as file:
    file.write("[1, ")
    file.flush()
    time.sleep(2)
    file.write("2]")
"""
ONCE = """
import os, sys, time
if os.path.exists("out/a"):
    sys.exit("it is there")
open("out/a", "w").close()
time.sleep(2)
"""
MORE = """
import time
open("out/a.txt", "a").write("more")
time.sleep(2)
"""
LEFT = """
import signal, sys, time
def stop(number, frame):
    print(f"cogvideo: stopped by {signal.Signals(number).name}", file=sys.stderr)
    sys.exit(128 + number)
for number in (1, 2, 15):
    signal.signal(number, stop)
open("out/.part-a", "w").close()
time.sleep(2)
import os
os.replace("out/.part-a", "out/a")
"""
RAISE = "import time; time.sleep(2)"
CHILD = """
import os, subprocess, time
if not os.path.exists("out/a"):
    open("out/a", "w").close()
    subprocess.Popen(["sleep", "9"])
time.sleep(2)
"""
AGAIN = """
import os, time
open("out/b.part", "w").write("1")
os.replace("out/b.part", "out/b.npz")
time.sleep(2)
"""
CASES = [  # program, harm, the flags that it must get
    (HALF, "kill", {"half"}),
    (ONCE, "kill", {"again"}),
    (MORE, "kill", {"different"}),
    (LEFT, "stop", {"part"}),
    (RAISE, "stop", {"exit", "lines"}),
    (CHILD, "kill", {"orphan"}),
    (AGAIN, "kill", {"lost"}),
]


@LINUX
@pytest.mark.parametrize(("program", "harm", "flags"), CASES)
def test_every_flag_can_be_raised(tmp_path, monkeypatch, program, harm, flags):
    monkeypatch.setattr(loss, "is_whole", lambda path: path.suffix != ".json" or path.read_text()[-1] == "]")
    stage = Small(tmp_path)
    work = Work(program, kept="*.npz")
    stage.clear()
    assert stage.start(work).wait().code == 0
    usual = Usual(seconds=1.0, changes=1, room=1, files=loss.digests(stage.out))

    class Fixed(Random):
        """Kills by time, in the middle; the signal is SIGTERM."""

        def random(self) -> float:
            return 0.9

        def uniform(self, low: float, high: float) -> float:
            return 1.0

        def choice(self, values):
            return signal.SIGTERM

    found, story = loss.run_case(stage, work, usual, harm, Fixed())
    assert flags <= {*found}, story


def test_an_error_is_one_line_and_exit_code_2():
    assert loss.judge_error(Told(2, ["cogvideo: cannot write a: No space left on device"])) == []
    assert loss.judge_error(Told(1, ["Traceback (most recent call last):"])) == ["traceback"]
    assert loss.judge_error(Told(-6, ["cogvideo: it died"])) == ["exit"]
    assert loss.judge_error(Told(2, ["cogvideo: one", "cogvideo: two"])) == ["lines"]
    assert loss.judge_error(Told(loss.HANGS, [])) == ["hang"]


@pytest.mark.parametrize("name", ["a.json", "a.npz", "a.png", "a.mp4", "a.tar", "a.pt", "a.safetensors"])
def test_half_a_file_is_not_whole(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 half")
    assert not loss.is_whole(tmp_path / name)


def test_a_command_dies_before_a_change(tmp_path):
    """Before the first change nothing is there; before the last one, all but the last name."""
    (tmp_path / "out").mkdir()
    program = "import sys; sys.argv[1:] = ['1', 'models']; from scripts.campaign import dying; "
    program += "from pathlib import Path; from cogvideo import cli; "
    program += "cli.main = lambda: (Path('out/a').touch(), Path('out/b').touch()); dying.main()"
    for last, files in ((1, []), (2, ["a"]), (0, ["a", "b"])):
        command = [sys.executable, "-c", program.replace("'1'", f"'{last}'")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        for file in (tmp_path / "out").iterdir():
            file.unlink()
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == (-signal.SIGKILL if last else 0), done.stderr
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert done.stderr.endswith("2 changes\n")

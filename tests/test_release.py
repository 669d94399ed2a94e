"""What is released: the sdist and the wheel built from it, the notices of what it holds, and that the shipped
models need no network."""

import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import cogvideo

ROOT = Path(__file__).parent.parent
LARGEST = 60 * 2**20  # bytes of the wheel
OFFLINE = """
import os, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("network:", event, arguments[-1], file=sys.stderr, flush=True)
        os._exit(9)  # an exception could be caught

sys.addaudithook(refuse)
from cogvideo import cli
cli.main()
"""


def tracked(folder: str = ".") -> list[str]:
    """The files of the repository, those not committed yet included."""
    command = ["git", "ls-files", "-co", "--exclude-standard", folder]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist builds."""
    pytest.importorskip("build", reason="build is not installed")
    folder = tmp_path_factory.mktemp("release")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, folder / "source"], check=True)
    assert len(list(folder.glob("*.tar.gz"))) == 1
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = f"cogvideo-{cogvideo.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(metadata)} == set(tracked("cogvideo"))
    licences = {name.removeprefix(f"{metadata}licenses/") for name in names if "dist-info/licenses/" in name}
    texts = {str(path.relative_to(ROOT)) for path in ROOT.glob("cogvideo/data/tinyworld/sprites/LICENSES/*")}
    assert licences == {"LICENSE", "NOTICE", "cogvideo/gpt2/LICENSE"} | texts
    assert wheel.stat().st_size <= LARGEST


def test_the_wheel_is_installed_alone_and_says_its_version(wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, wheel]
    subprocess.run(install, check=True)
    program = [sys.executable, "-c", "from cogvideo.cli import main; main()", "--version"]
    said = subprocess.run(program, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert said == f"cogvideo {cogvideo.__version__}\n"


def test_every_place_says_the_same_version():
    version = cogvideo.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version


def test_every_shipped_file_has_a_line_in_the_notice():
    lines = re.findall(r"^    (cogvideo/\S+)  +\S", (ROOT / "NOTICE").read_text(), re.MULTILINE)
    files = [name for name in tracked("cogvideo") if not name.endswith(".py")]
    assert lines and files
    for name in files:
        assert any(fnmatchcase(name, line) for line in lines), f"NOTICE has no line for {name}"
    for line in lines:
        assert any(fnmatchcase(name, line) for name in files), f"there is no {line}"


def offline(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command, ended with exit code 9 by its first use of the network."""
    command = [sys.executable, "-c", OFFLINE, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_shipped_models_touch_no_network(tmp_path):
    animals = ("dog", "cat", "rocket", "ghost", "whale", "octopus", "penguin", "car")
    (tmp_path / "prompts.txt").write_text("".join(f"a {animal} runs to the right\n" for animal in animals))
    (tmp_path / "reference").mkdir()
    commands = (
        "generate --prompts prompts.txt --model direct-tiny --quiet -o generated/a.mp4",
        "generate whale --num-frames 1 -o whale.png",
        "evaluate generated/ reference/ -o report.json --preset tinyworld --scorer tinyworld --few",
    )
    for command in commands:
        done = offline(tmp_path, *command.split())
        assert not done.returncode, done.stderr
        for number in (1, 3, 5, 7):
            made = tmp_path / "generated" / f"a-{number}.mp4"
            if made.exists():
                made.rename(tmp_path / "reference" / made.name)
    assert (tmp_path / "whale.png").exists() and (tmp_path / "report.json").exists()


def test_a_model_of_the_hub_would_have_been_noticed(tmp_path):
    done = offline(tmp_path, "generate", "a cat jumps", "--model", "nobody/nothing", "-o", "cat.mp4")
    assert done.returncode == 9 and "network: socket." in done.stderr

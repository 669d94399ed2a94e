"""The fast part of the tests with the lowest and the highest supported versions, as a table.

    python -m scripts.matrix                          every Python that uv finds, lowest and highest
    python -m scripts.matrix --only lowest --python 3.10
    python -m scripts.matrix --keep FOLDER            leaves the environments there

Builds the sdist, the wheel from it, and for each row an empty environment with the wheel alone. There it runs
the first command of the README and the tests, outside the repository. Needs `pip install uv`. On Linux, the
torch of PyPI brings CUDA libraries: a row takes up to 8 GB of disk while it runs.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
RESOLUTIONS = {"lowest": "lowest-direct", "highest": "highest"}
SHOWN = ("torch", "numpy", "av", "pillow")
FAST = """
    attention config decoder discriminator hvqvae layout losses metrics pipeline regression sampling sources
    superres survey text transformer video vqvae weights
"""  # test files
TOOLS = ("pytest>=8", "scipy", "scikit-video==1.1.11", "tifffile")
EXAMPLE = ("a dog runs to the right across a green field", "-o", "dog.mp4", "--seed", "7")


def uv(*arguments: str | Path) -> str:
    """What uv prints; CalledProcessError if it fails."""
    command = ["uv", "--quiet", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def build(folder: Path) -> Path:
    """The wheel, built from the sdist."""
    uv("build", "--out-dir", folder, ROOT)
    return next(folder.glob("*.whl"))


def copy_tests(folder: Path) -> None:
    """What the tests need beside the package."""
    ignored = shutil.ignore_patterns("cogvideo", "__pycache__", "*.egg-info")
    for name in ("tests", "scripts", "benchmarks", "docs", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)


def install(wheel: Path, environment: Path, python: str, resolution: str) -> Path:
    """The interpreter of a new environment with the wheel, then what the tests import."""
    uv("venv", "--python", python, environment)
    interpreter = environment / "bin" / "python"
    pip = ("pip", "install", "--python", interpreter, "--only-binary", ":all:")
    # by pyproject.toml: of a wheel, its own bounds would not count as direct
    extras = ("--extra", "eval", "--extra", "serve")
    uv(*pip, "--resolution", RESOLUTIONS[resolution], "--requirements", ROOT / "pyproject.toml", *extras)
    uv(*pip, "--no-deps", wheel)
    uv(*pip, *TOOLS)
    return interpreter


def versions(interpreter: Path) -> list[str]:
    listed = uv("pip", "freeze", "--python", interpreter)
    found = dict(re.findall(r"^(\S+)==(\S+)$", listed, re.MULTILINE))
    return [found[name] for name in SHOWN]


def run(interpreter: Path, tests: Path) -> str:
    """The last line of pytest, or what failed before it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    generate = [interpreter.parent / "cogvideo", "generate", *EXAMPLE]
    files = [f"tests/test_{name}.py" for name in FAST.split()]
    pytest = [interpreter, "-m", "pytest", "-q", "--tb=short", *files]
    for command in (generate, pytest):
        done = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-6000:], done.stderr[-3000:], flush=True)
        if done.returncode and command is generate:
            return "cogvideo generate failed"
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="run the fast tests with the supported versions")
    parser.add_argument("--only", nargs="+", choices=RESOLUTIONS, default=list(RESOLUTIONS))
    parser.add_argument("--python", nargs="+", default=list(PYTHONS))
    parser.add_argument("--keep", type=Path, help="a folder for the environments")
    arguments = parser.parse_args()
    if shutil.which("uv") is None:
        parser.error("there is no uv: pip install uv")
    print("| Python | versions |", " | ".join(SHOWN), "| tests | time |")
    print("|---|---|" + "---|" * (len(SHOWN) + 2), flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        wheel = build(folder / "dist")
        for python in arguments.python:
            for resolution in arguments.only:
                row = folder / f"{python}-{resolution}"
                copy_tests(row / "tests")
                begun = time.perf_counter()
                try:
                    interpreter = install(wheel, row / "venv", python, resolution)
                    shown = versions(interpreter)
                    begun = time.perf_counter()
                    result = run(interpreter, row / "tests")
                except subprocess.CalledProcessError as error:
                    shown = ["-"] * len(SHOWN)
                    result = f"not installed: {error.stderr.strip().splitlines()[-1]}"
                failed = failed or " passed" not in result or " failed" in result or " error" in result
                cells = (python, resolution, *shown, result, f"{time.perf_counter() - begun:.0f} s")
                print("|", " | ".join(cells), "|", flush=True)
                if arguments.keep is None:
                    shutil.rmtree(row)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()

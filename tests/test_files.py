"""What is written is whole or not there; what a killed process left goes; a folder has one writer."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cogvideo.files import atomic_folder, atomic_path, only_writer, remove_parts, writing

HALF = """
import os, sys
from pathlib import Path
from cogvideo.files import atomic_path
with atomic_path(Path(sys.argv[1])) as part:
    part.write_text("half")
    print("half", flush=True)
    sys.stdin.read()
"""
HOLD = """
import sys
from pathlib import Path
from cogvideo.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def begin(program: str, path: Path) -> subprocess.Popen[str]:
    """A process that has come to the middle of its work."""
    command = [sys.executable, "-c", program, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_a_killed_writer_leaves_the_old_file_and_a_part_that_the_next_one_removes(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    process = begin(HALF, file)
    process.kill()
    process.communicate()
    assert file.read_text() == "old" and len([*tmp_path.iterdir()]) == 2
    with atomic_path(tmp_path / "b.txt") as part:
        part.write_text("another")
    assert len([*tmp_path.iterdir()]) == 3  # only what would have become b.txt
    with atomic_path(file) as part:
        part.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]
    assert file.read_text() == "new"


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    file = tmp_path / "a.txt"
    process = begin(HALF, file)
    with atomic_path(file) as part:
        part.write_text("ours")
    remove_parts(tmp_path)
    assert file.read_text() == "ours"
    process.communicate("")
    assert process.returncode == 0 and file.read_text() == "half"  # the last one counts
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_parts_of_other_machines_and_other_files_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".part-000000-{dead.pid}-abcd-a.txt", ".part-notes.txt", "part-1.txt"]
    for name in names:
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names}


def test_an_error_leaves_a_folder_as_it_was(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("old")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "a") as part:
        (part / "config.json").write_text("new")
        raise KeyError
    assert (tmp_path / "a" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_has_one_writer(tmp_path):
    folder = tmp_path / "out"
    process = begin(HOLD, folder)
    expected = f"process {process.pid} is writing into .*out; wait"
    with pytest.raises(ValueError, match=expected), only_writer(folder):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with only_writer(folder):  # which nobody holds now
        (folder / "a").touch()
    assert (folder / "a").exists()


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(KeyError), only_writer(tmp_path / "out"):
        raise KeyError
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    expected = "file is a file; choose another name"
    with pytest.raises(ValueError, match=expected), only_writer(tmp_path / "file"):
        pass


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_names_the_file(tmp_path):
    expected = r"^cannot write .*a\.txt: No space left on device$"
    with (
        pytest.raises(OSError, match=expected),
        atomic_path(tmp_path / "a.txt"),
        open("/dev/full", "w") as full,
    ):
        full.write("a" * 100_000)
    assert not [*tmp_path.iterdir()]


def test_errors_of_other_files_keep_their_name():
    with pytest.raises(FileNotFoundError, match="elsewhere"), writing(Path("a")):
        Path("/nowhere/elsewhere").read_text()
    with pytest.raises(OSError, match="cannot write a: Input/output error"), writing(Path("a")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

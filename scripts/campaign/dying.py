"""Run `cogvideo`, and kill it just before its Nth change of the file system.

    python -m scripts.campaign.dying N ARGUMENT...

With N = 0 it is not killed; the last line on stderr then says how many changes there were. What libraries
change from C++ is not seen, but the renaming afterwards is.
"""

import os
import signal
import sys

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


class Counter:
    """Counts changes below a folder, in this process alone."""

    def __init__(self, folder: str, last: int):
        self.folder = folder
        self.last = last
        self.count = 0
        self.process = os.getpid()

    def see(self, event: str, arguments: tuple[object, ...]) -> None:
        """An audit hook."""
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)) or os.getpid() != self.process:
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    counter = Counter(os.path.abspath("out") + os.sep, int(sys.argv[1]))
    sys.argv[:2] = ["cogvideo"]
    sys.addaudithook(counter.see)
    from cogvideo.__main__ import main as run

    try:
        run()
    finally:
        print(f"{counter.count} changes", file=sys.stderr)


if __name__ == "__main__":
    main()

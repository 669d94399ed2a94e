"""A PostgreSQL of one's own, in a temporary folder, for tests and trials; it leaves nothing behind.

    python -m scripts.postgres           prints its URL and runs until interrupted

Debian: apt-get install postgresql. The server refuses to run as root; then it runs as the user postgres.
"""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

START_SECONDS = 30


def find_programs() -> Path | None:
    """The folder of initdb and postgres, or None."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists():
            return folder
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Postgres:
    """A server that can be stopped and started again: its data stay."""

    def __init__(self, folder: Path, programs: Path):
        self.folder = folder
        self.programs = programs
        self.port = _free_port()
        self.url = f"postgresql://tests@127.0.0.1:{self.port}/postgres"
        self._user = "postgres" if os.getuid() == 0 else None
        if self._user:
            os.chown(folder, pwd.getpwnam(self._user).pw_uid, -1)
        self._run(["initdb", "-D", str(folder / "data"), "-U", "tests", "--auth=trust", "--no-sync"])
        self._server: subprocess.Popen[bytes] | None = None

    def _command(self, command: Sequence[str]) -> list[str]:
        return [str(self.programs / command[0]), *command[1:]]

    def _run(self, command: Sequence[str]) -> None:
        done = subprocess.run(self._command(command), capture_output=True, user=self._user, cwd=self.folder)
        if done.returncode:
            raise OSError(done.stderr.decode(errors="replace"))

    def start(self) -> None:
        options = ["-D", str(self.folder / "data"), "-p", str(self.port), "-k", str(self.folder)]
        command = self._command(["postgres", *options, "-c", "listen_addresses=127.0.0.1"])
        log = (self.folder / "log").open("ab")
        self._server = subprocess.Popen(command, stdout=log, stderr=log, user=self._user, cwd=self.folder)
        ready = self._command(["pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)])
        for _ in range(10 * START_SECONDS):
            if subprocess.run(ready).returncode == 0:
                return
            time.sleep(0.1)
        raise OSError((self.folder / "log").read_text(errors="replace"))

    def stop(self) -> None:
        """Stop at once, as a crash would."""
        if self._server is not None:
            self._server.send_signal(3)
            self._server.wait(START_SECONDS)
            self._server = None


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A running server; OSError if PostgreSQL is not installed."""
    programs = find_programs()
    if programs is None:
        raise OSError("PostgreSQL is not installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="cogvideo-postgres-"))
    server = None
    try:
        server = Postgres(folder, programs)
        server.start()
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    with postgres() as running:
        print(running.url, flush=True)
        with suppress(KeyboardInterrupt):
            time.sleep(10**8)

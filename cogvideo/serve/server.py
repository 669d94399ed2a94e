"""One command: the server, and as many workers as asked for, each a process that is started again when it
dies."""

import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from cogvideo.files import expand_user
from cogvideo.serve.app import Service, build_app
from cogvideo.serve.doors import Doors
from cogvideo.serve.jobs import JobStore
from cogvideo.serve.request import Catalogue
from cogvideo.serve.results import Results
from cogvideo.serve.statistics import Statistics
from cogvideo.serve.worker import NAME, PARENT

CHECK_SECONDS = 0.5
LONGEST_PAUSE = 30.0  # seconds between two starts of a worker that dies at once
HEALTHY_SECONDS = 20.0  # after which a worker counts as started

log = logging.getLogger("cogvideo.server")


@dataclass(frozen=True)
class Address:
    """Where jobs and results are."""

    database: str  # an URL of SQLAlchemy
    results: str  # a folder, or an URL of fsspec

    @classmethod
    def of(cls, data: Path, database: str | None, results: str | None) -> "Address":
        """Both in one folder, unless they are elsewhere."""
        data = expand_user(data)
        if database is None or results is None:
            data.mkdir(parents=True, exist_ok=True)
        return cls(database or f"sqlite:///{data / 'jobs.sqlite'}", results or str(data / "videos"))


class Crew:
    """Workers in separate processes, started again when they die."""

    def __init__(self, command: Sequence[str], count: int, lost: Callable[[str], None]):
        self.command = list(command)
        self.lost = lost  # is told the name of a worker that died
        self.names = [""] * count
        self.processes: list[subprocess.Popen[bytes] | None] = [None] * count
        self._started = [0.0] * count
        self._pause = [0.0] * count
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Crew":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        running = [process for process in self.processes if process is not None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def _watch(self) -> None:
        while not self._ended.wait(CHECK_SECONDS):
            for i, process in enumerate(self.processes):
                if process is not None and process.poll() is None:
                    continue
                self._start(i)

    def _start(self, i: int) -> None:
        """Start worker i, later each time it dies at once."""
        now = time.monotonic()
        lived = now - self._started[i]
        if self.processes[i] is not None:
            if lived > HEALTHY_SECONDS:
                self._pause[i] = 0.0
            if lived < self._pause[i]:
                return
            log.warning("worker %d ended; it is started again", i)
            self._report(self.names[i])
            self._pause[i] = min(LONGEST_PAUSE, 2 * self._pause[i] + 1.0)
        self._started[i] = now
        self.names[i] = secrets.token_hex(4)
        environment = {**os.environ, PARENT: str(os.getpid()), NAME: self.names[i]}
        self.processes[i] = subprocess.Popen(self.command, env=environment)

    def _report(self, name: str) -> None:
        try:
            self.lost(name)
        except Exception as error:  # of the database: then the leases end by themselves
            log.warning("the jobs of a dead worker wait for the end of their lease: %s", error)


def worker_command(address: Address, options: Sequence[str]) -> list[str]:
    """The command that starts a worker."""
    command = [sys.executable, "-m", "cogvideo", "worker"]
    return [*command, "--database", address.database, "--results", address.results, *options]


def check_port(host: str, port: int) -> None:
    """Raise ValueError if nobody can listen there, before anything is started."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"cannot listen at {host}:{port}: {error.strerror}; choose another --port"
            ) from None


def serve(
    address: Address,
    models: Sequence[str],
    doors: Doors,
    *,
    host: str,
    port: int,
    workers: int,
    worker_options: Sequence[str] = (),
    max_queue: int = 1000,
    keep_seconds: float = 7 * 86400.0,
) -> None:
    """Serve until interrupted."""
    check_port(host, port)
    catalogue = Catalogue(models)
    store = JobStore(address.database, max_queue=max_queue, keep_seconds=keep_seconds)
    results = Results(address.results)
    app = build_app(Service(catalogue, store, results, doors, Statistics(store)))
    with Crew(worker_command(address, worker_options), workers, store.release_lost):
        print(f"http://{host}:{port}/   (API: /docs)", flush=True)
        uvicorn.run(
            app, host=host, port=port, access_log=False, log_level="warning", timeout_graceful_shutdown=3
        )

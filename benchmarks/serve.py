"""How does the server bear load and faults?

    python -m benchmarks.serve load --model tiny            jobs a minute, first previews, status calls
    python -m benchmarks.serve memory --jobs 1000           of server and worker, over many nano jobs
    python -m benchmarks.serve kills --kills 30             kill -9 of server and worker at random moments

Every part starts its own server with one worker, as `cogvideo serve` does, in a temporary folder.

load: so many clients each ask for a video, watch its events until it is finished, and ask again, for
--minutes. Beside them, one more asks for the state of a job twenty times a second: those are the status
calls whose latency is reported.

memory: the resident memory of server and worker after each tenth of the jobs, once all kinds have been asked
for; the videos are deleted on the way.

kills: clients ask for videos by a few seeds; server or worker is killed at random moments and started again.
At the end each job must be completed, once, and to the file that its seed gives.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PROMPT = "a dog runs to the right"
STATUS_SECONDS = 0.05  # between two status calls


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """A server that can be killed and started again at the same address."""

    model: str
    data: Path
    threads: int
    port: int = field(default_factory=free_port)
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        places = ["--port", str(self.port), "--data", str(self.data), "--models", self.model]
        command = [sys.executable, "-m", "cogvideo", "serve", *places, "--threads", str(self.threads)]
        log = (self.data / "log").open("ab")
        self.process = subprocess.Popen([*command, "--max-queue", "100000"], stdout=log, stderr=log)
        for _ in range(1200):
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError((self.data / "log").read_text())

    def stop(self, how: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait()

    def children(self) -> list[int]:
        """The workers of this server."""
        assert self.process is not None
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(line) for line in found.stdout.split()]

    def call(self, path: str, method: str = "GET", body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()

    def get(self, path: str) -> dict:
        return json.loads(self.call(path))

    def ask(self, **more: object) -> str:
        return json.loads(self.call("/v1/videos", "POST", {"prompt": PROMPT, **more}))["id"]

    def wait(self, id: str) -> dict:
        while True:
            video = self.get(f"/v1/videos/{id}")
            if video["status"] in ("completed", "failed"):
                return video
            time.sleep(0.1)


@contextmanager
def server(model: str, threads: int) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        made = Server(model, Path(folder), threads)
        made.start()
        try:
            yield made
        finally:
            made.stop()


# -- load --


@dataclass
class Seen:
    """What clients saw."""

    previews: list[float] = field(default_factory=list)  # seconds from asking to the first picture
    videos: list[float] = field(default_factory=list)  # and to the video
    status: list[float] = field(default_factory=list)  # seconds of a status call
    errors: list[str] = field(default_factory=list)


def watch(at: Server, seen: Seen, until: float) -> None:
    """Ask for a video, watch it, and again."""
    while time.monotonic() < until:
        started = time.monotonic()
        try:
            id = at.ask()
            first = None
            with urllib.request.urlopen(f"{at.url}/v1/videos/{id}/events", timeout=3600) as stream:
                for line in stream:
                    if line.startswith(b"event: preview") and first is None:
                        first = time.monotonic() - started
        except OSError as error:
            seen.errors.append(str(error))
            continue
        if time.monotonic() < until:
            seen.videos.append(time.monotonic() - started)
        if first is not None:
            seen.previews.append(first)


def poll(at: Server, id: str, seen: Seen, until: float) -> None:
    """Status calls, at a steady pace."""
    while time.monotonic() < until:
        started = time.monotonic()
        at.get(f"/v1/videos/{id}")
        seen.status.append(time.monotonic() - started)
        time.sleep(max(0.0, STATUS_SECONDS - (time.monotonic() - started)))


def load(args: argparse.Namespace) -> None:
    print("| clients | videos a minute | first preview s | video s | status p50 ms | p99 ms | errors |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for clients in args.clients:
        with server(args.model, args.threads) as at:
            first_job = at.ask(num_frames=5)
            at.wait(first_job)  # the model is loaded
            seen = Seen()
            started = time.monotonic()
            until = started + 60 * args.minutes
            threads = [threading.Thread(target=watch, args=(at, seen, until)) for _ in range(clients)]
            threads.append(threading.Thread(target=poll, args=(at, first_job, seen, until)))
            for thread in threads:
                thread.start()
            time.sleep(max(0.0, until - time.monotonic()))
            done = at.get("/health")["jobs"]["completed"] - 1
            os.kill(at.process.pid, signal.SIGKILL)  # the clients end with it
            at.start()
            for thread in threads:
                thread.join(1)
            milliseconds = 1000 * np.percentile(seen.status, (50, 99))
            first = np.median(seen.previews) if seen.previews else float("nan")
            whole = np.median(seen.videos) if seen.videos else float("nan")
            print(
                f"| {clients} | {done / args.minutes:.1f} | {first:.1f} | {whole:.1f} | "
                f"{milliseconds[0]:.0f} | {milliseconds[1]:.0f} | {len(seen.errors)} |",
                flush=True,
            )


# -- memory --


def resident(pid: int) -> float:
    """Megabytes of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def memory(args: argparse.Namespace) -> None:
    print("| jobs | server MB | worker MB |\n|---:|---:|---:|")
    with server(args.model, args.threads) as at:
        for done in range(1, args.jobs + 1):
            id = at.ask(seed=done, num_frames=(5, 9, 17, 33)[done % 4])
            assert at.wait(id)["status"] == "completed"
            at.call(f"/v1/videos/{id}/content")
            at.call(f"/v1/videos/{id}", "DELETE")
            if done % max(1, args.jobs // 10) == 0:
                (worker,) = at.children()
                print(f"| {done} | {resident(at.process.pid):.0f} | {resident(worker):.0f} |", flush=True)


# -- kills --


def kills(args: argparse.Namespace) -> None:
    chance = random.Random(args.seed)
    seeds = 5
    with server(args.model, args.threads) as at:
        ids: dict[str, int] = {}
        for number in range(args.kills):
            for _ in range(3):
                seed = chance.randrange(seeds)
                ids[at.ask(seed=seed)] = seed
            while not at.get("/health")["jobs"]["in_progress"]:
                time.sleep(0.05)
            time.sleep(chance.uniform(0.0, 1.5))
            if number % 2:
                for worker in at.children():
                    os.kill(worker, signal.SIGKILL)
            else:
                at.stop(signal.SIGKILL)
                at.start()
            print(f"kill {number + 1}: {at.get('/health')['jobs']}", flush=True)
        states = [at.wait(id)["status"] for id in ids]
        files: dict[int, set[str]] = {}
        for id, seed in ids.items():
            digest = hashlib.sha256(at.call(f"/v1/videos/{id}/content")).hexdigest()
            files.setdefault(seed, set()).add(digest)
        listed = at.get("/v1/videos?limit=100")["data"]
        counts = at.get("/health")["jobs"]
    lost = states.count("failed")
    doubled = sum(len(found) - 1 for found in files.values())
    print(f"{len(ids)} jobs, {args.kills} kills: {lost} lost, {doubled} of another content than their seed's")
    print(f"jobs of the queue: {counts}; listed {len(listed)}")
    if lost or doubled or counts["completed"] != len(ids):
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("load", "memory", "kills"))
    parser.add_argument("--model", default="tiny", help="a shipped name or a model folder")
    parser.add_argument("--threads", type=int, default=1, help="of the worker")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--minutes", type=float, default=2.0, help="for each number of clients")
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"load": load, "memory": memory, "kills": kills}[args.part](args)


if __name__ == "__main__":
    main()

"""Takes jobs from the queue and generates them, one batch at a time, until it is told to stop.

A separate thread renews the lease: while it does, no other worker touches the jobs. It also learns there
what is cancelled, within half a second.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from cogvideo.generate.cogvideo import load
from cogvideo.generate.pipeline import Pipeline
from cogvideo.hardware import free_memory
from cogvideo.serve.generation import Cancelled, Generation, Place
from cogvideo.serve.jobs import Batch, Held, JobStore
from cogvideo.serve.request import Catalogue
from cogvideo.serve.results import Results

PARENT = "COGVIDEO_PARENT"  # environment: the process whose end ends a worker
NAME = "COGVIDEO_WORKER"  # environment: the name that leases begin with
LEASE_SECONDS = 15.0
RENEW_SECONDS = 0.5
IDLE_SECONDS = 0.25  # between two looks at an empty queue
SWEEP_SECONDS = 60.0
RETRY_SECONDS = 2.0  # after the database or the results could not be reached
MAX_VIDEOS = 16  # generated together

log = logging.getLogger("cogvideo.worker")


@dataclass(frozen=True)
class Settings:
    """How a worker behaves."""

    models: tuple[str, ...] = ("tiny", "direct-tiny")
    device: str = "cpu"
    memory: float | None = None  # bytes of all loaded models; None: 80 % of what is free at the start
    first_frame_seconds: float = 5.0  # a batch is no larger than allows a first frame by then
    quota: int | None = None  # bytes of results
    nice: int = 5  # so that the server answers while workers compute


class Lease:
    """Renews the lease of a batch in the background; `held` says what is left of it."""

    def __init__(self, store: JobStore, batch: Batch):
        self.store = store
        self.batch = batch
        self._ended = threading.Event()
        self._held = Held(frozenset(job.id for job in batch.jobs), batch.watched)
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def held(self) -> Held:
        """What is held; nothing, if the lease could not be renewed for so long that it has ended."""
        late = time.monotonic() - self._renewed > LEASE_SECONDS
        return Held() if late else self._held

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                self._held = self.store.renew(self.batch.lease, LEASE_SECONDS)
                self._renewed = time.monotonic()
            except Exception as error:  # of whatever database this is
                log.warning("the lease could not be renewed: %s", error)


@dataclass
class Models:
    """Loaded models, at most `memory` bytes of them; the least recently used goes first."""

    locations: dict[str, str]
    device: str
    memory: float
    _loaded: "OrderedDict[str, tuple[Pipeline, float]]" = field(default_factory=OrderedDict)

    def get(self, name: str) -> Pipeline:
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return self._loaded[name][0]
        pipe = load(self.locations[name], self.device)
        needed = pipe.estimate(1).least
        while self._loaded and self.used + needed > self.memory:
            gone, _ = self._loaded.popitem(last=False)
            log.info("%s leaves the memory", gone)
        self._loaded[name] = (pipe, needed)
        return pipe

    @property
    def used(self) -> float:
        return sum(needed for _, needed in self._loaded.values())


class Pace:
    """How many videos a model generates together: as many as were worth it, and no more than allow a first
    frame in time.

    A size is worth it if a video takes a tenth less than in smaller batches; then twice as many are tried.
    """

    def __init__(self, limit: float):
        self.limit = limit  # seconds until a first frame
        self._first: dict[str, float] = {}  # seconds of a first frame in a batch, for each of its videos
        self._each: dict[str, dict[int, float]] = {}  # by model and size: seconds for each video

    def most(self, model: str) -> int:
        tried = self._each.get(model, {})
        if not tried:
            return 1
        enough = 1.1 * min(tried.values())
        best = min(size for size, seconds in tried.items() if seconds <= enough)
        worth = 2 * best if best == max(tried) else best
        in_time = int(self.limit / self._first[model]) if model in self._first else MAX_VIDEOS
        return max(1, min(MAX_VIDEOS, worth, in_time))

    def learn(self, model: str, videos: int, seconds: float, first_frame: float | None) -> None:
        """A batch took so many seconds, of these the first frames so many."""
        self._each.setdefault(model, {})[videos] = seconds / videos
        if first_frame is not None:
            self._first[model] = first_frame / videos


class Worker:
    def __init__(self, store: JobStore, results: Results, settings: Settings):
        self.store = store
        self.results = results
        self.settings = settings
        self.stopping = threading.Event()
        self.pace = Pace(settings.first_frame_seconds)
        memory = settings.memory
        if memory is None:
            memory = 0.8 * (free_memory(settings.device) or float("inf"))
        self.models = Models(Catalogue(settings.models).locations, settings.device, memory)
        self._swept = 0.0
        self._orphans: set[str] = set()  # folders that belonged to no job at the last sweep

    def run(self) -> None:
        """Work until `stopping` is set."""
        log.info(
            "worker %s on %s serves %s", os.getpid(), socket.gethostname(), ", ".join(self.models.locations)
        )
        while not self.stopping.is_set():
            try:
                self._sweep()
                worked = self.work()
            except Exception:  # of the database or of the place of the results: it may come back
                log.exception("cannot reach the queue")
                self.stopping.wait(RETRY_SECONDS)
                continue
            if not worked:
                self.stopping.wait(IDLE_SECONDS)

    def work(self) -> bool:
        """Generate one batch; False if nothing waits."""
        most = {model: self.pace.most(model) for model in self.models.locations}
        batch = self.store.take(most, LEASE_SECONDS, os.environ.get(NAME, ""))
        if batch is None:
            return False
        with Lease(self.store, batch) as lease:
            self._generate(batch, lease)
        if self.stopping.is_set():
            self.store.release(batch.lease)
        return True

    def _generate(self, batch: Batch, lease: Lease) -> None:
        """Generate a batch; if it fails, each job alone, so that one does not take the others along."""
        try:
            self._run(batch, lease)
        except Cancelled:
            return
        except Exception as error:
            if len(batch.jobs) == 1:
                log.exception("%s failed", batch.jobs[0].id)
                self.store.fail(batch.lease, batch.jobs[0].id, *_reason(error))
                return
            log.warning("a batch of %d failed: %s; now each job alone", len(batch.jobs), error)
            for job in batch.jobs:
                known = self.store.get(job.id)
                if known is not None and not known.finished:
                    self._generate(Batch(batch.lease, [known]), lease)

    def _run(self, batch: Batch, lease: Lease) -> None:
        model = batch.jobs[0].request.model
        pipe = self.models.get(model)
        generation = Generation(
            pipe, batch, Place(self.store, self.results, HeldUntilStop(lease, self.stopping))
        )
        videos = sum(job.request.n for job in batch.jobs)
        started = time.monotonic()
        generation.run()
        if not batch.jobs[0].frames:  # not resumed
            self.pace.learn(model, videos, time.monotonic() - started, generation.first_frame_seconds)
        log.info("%d videos by %s", videos, model)

    def _sweep(self) -> None:
        """Now and then: forget what has expired, with its files, and files that belong to no job."""
        now = time.monotonic()
        if now - self._swept < SWEEP_SECONDS and self._swept:
            return
        self._swept = now
        for id in self.store.sweep(self.settings.quota):
            self.results.remove(id)
        unknown = self.store.unknown([id for id in self.results.ids() if id.startswith("video_")])
        for id in self._orphans.intersection(unknown):  # the input of a new job is there before the job
            self.results.remove(id)
        self._orphans = set(unknown)


@dataclass(frozen=True)
class HeldUntilStop:
    """What a lease holds; nothing, once the worker stops."""

    lease: Lease
    stopping: threading.Event

    def __call__(self) -> Held:
        return Held() if self.stopping.is_set() else self.lease.held()


def _reason(error: Exception) -> tuple[str, str]:
    """Code and message of a failed job."""
    text = " ".join(str(error).split())[:500] or type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "out_of_memory", "there was too little memory for this video"
    if isinstance(error, OSError):
        return "storage_error", text
    if isinstance(error, ValueError):
        return "invalid_request", text
    return "generation_failed", f"{type(error).__name__}: {text}"


def end_with(parent: int, stopping: threading.Event) -> None:
    """Stop when the process that started this one is gone."""

    def watch() -> None:
        while not stopping.wait(1.0):
            if os.getppid() != parent:
                stopping.set()

    threading.Thread(target=watch, daemon=True).start()


def serve_jobs(store: JobStore, results: Results, settings: Settings) -> None:
    """Be a worker until a signal comes, or the server that started it ends; then the jobs go back into the
    queue."""
    if settings.nice:
        os.nice(settings.nice)
    worker = Worker(store, results, settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stopping.set())
    if PARENT in os.environ:
        end_with(int(os.environ[PARENT]), worker.stopping)
    worker.run()

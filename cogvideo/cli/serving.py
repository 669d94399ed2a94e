"""cogvideo serve, and the workers that it starts."""

import importlib.util
import logging
import os
from pathlib import Path

DATA = Path("~/.cogvideo")
Gigabytes = float


def serve(
    host: str = "127.0.0.1",
    port: int = 8000,
    models: tuple[str, ...] = ("tiny", "direct-tiny"),
    workers: int = 1,
    data: Path = DATA,
    database: str | None = None,
    results: str | None = None,
    api_keys: Path | None = None,
    no_auth: bool = False,
    origins: tuple[str, ...] = (),
    max_queue: int = 1000,
    max_upload: int = 50,
    keep_days: float = 7.0,
    quota: Gigabytes | None = None,
    device: str = "cpu",
    threads: int | None = None,
    memory: Gigabytes | None = None,
    first_frame_seconds: float = 5.0,
) -> None:
    """Serve a page and the endpoints of /v1/videos, with workers. docs/serving.md explains it.

    Jobs are stored before they are acknowledged; after an interruption they resume.

    Args:
        host: The address to listen at. One that others can reach needs --api-keys or --no-auth.
        port: The port.
        models: Shipped models, model folders or hub ids; the first is the default.
        workers: Processes that generate. 0: workers run elsewhere (cogvideo worker).
        data: The folder of the queue and the videos.
        database: Another place for the queue: postgresql://... for several machines.
        results: Another place for the videos: a folder, or an URL of fsspec. Default: in --data.
        api_keys: A file with a key on each line. COGVIDEO_API_KEYS adds others, separated by commas.
        no_auth: Let everybody generate who can reach the address.
        origins: Other web pages that may call the endpoints, as in https://example.org.
        max_queue: Unfinished jobs; more are refused with 429.
        max_upload: Megabytes of a request.
        keep_days: Days until a video is forgotten.
        quota: Gigabytes of videos, of which the oldest are forgotten.
        device: Where to compute: cpu, cuda, mps.
        threads: CPU threads of each worker. Default: the idle cores divided by the workers.
        memory: Gigabytes of loaded models. Default: 80 % of what is free.
        first_frame_seconds: How long the first frame may take where jobs are generated together.
    """
    _need_serve()
    from cogvideo.hardware import threads_of_each
    from cogvideo.limits import check_range, check_workers
    from cogvideo.serve import doors as doors_
    from cogvideo.serve.server import Address
    from cogvideo.serve.server import serve as run

    check_range("--port", port, 1, 65535)
    check_workers(workers)
    check_range("--max-queue", max_queue)
    check_range("--max-upload", max_upload)
    _check_worker(keep_days, quota, device, threads, memory, first_frame_seconds)
    keys = doors_.read_keys(api_keys, os.environ.get(doors_.KEYS_VARIABLE, ""))
    doors_.check_address(host, keys, no_auth)
    options = ["--models", *models, "--device", device, "--first-frame-seconds", str(first_frame_seconds)]
    options += ["--threads", str(threads or threads_of_each(workers))]
    for name, value in (("--memory", memory), ("--quota", quota)):
        options += [] if value is None else [name, str(value)]
    run(
        Address.of(data, database, results),
        models,
        doors_.Doors(keys, max_upload * 2**20, origins),
        host=host,
        port=port,
        workers=workers,
        worker_options=[*options, "--keep-days", str(keep_days)],
        max_queue=max_queue,
        keep_seconds=86400 * keep_days,
    )


def worker(
    models: tuple[str, ...] = ("tiny", "direct-tiny"),
    data: Path = DATA,
    database: str | None = None,
    results: str | None = None,
    keep_days: float = 7.0,
    quota: Gigabytes | None = None,
    device: str = "cpu",
    threads: int | None = None,
    memory: Gigabytes | None = None,
    first_frame_seconds: float = 5.0,
) -> None:
    """Generate jobs of a queue until interrupted; the options are those of cogvideo serve.

    Args:
        models: Shipped models, model folders or hub ids, by the same names as at the server.
        data: The folder of the queue and the videos.
        database: Another place for the queue: postgresql://... for several machines.
        results: Another place for the videos: a folder, or an URL of fsspec.
        keep_days: Days until a video is forgotten.
        quota: Gigabytes of videos, of which the oldest are forgotten.
        device: Where to compute: cpu, cuda, mps.
        threads: CPU threads. Default: as many as there are idle cores.
        memory: Gigabytes of loaded models. Default: 80 % of what is free.
        first_frame_seconds: How long the first frame may take where jobs are generated together.
    """
    _need_serve()

    import torch

    from cogvideo.hardware import threads_of_each
    from cogvideo.serve.jobs import JobStore
    from cogvideo.serve.results import Results
    from cogvideo.serve.server import Address
    from cogvideo.serve.worker import Settings, serve_jobs

    _check_worker(keep_days, quota, device, threads, memory, first_frame_seconds)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    torch.set_num_threads(threads or threads_of_each(1))
    address = Address.of(data, database, results)
    settings = Settings(
        models=models,
        device=device,
        memory=None if memory is None else memory * 1e9,
        first_frame_seconds=first_frame_seconds,
        quota=None if quota is None else int(quota * 1e9),
    )
    store = JobStore(address.database, keep_seconds=86400 * keep_days)
    serve_jobs(store, Results(address.results), settings)


def _check_worker(
    keep_days: float,
    quota: Gigabytes | None,
    device: str,
    threads: int | None,
    memory: Gigabytes | None,
    first_frame_seconds: float,
) -> None:
    """Raise ValueError for options that no worker could work with."""
    from cogvideo.hardware import find_device
    from cogvideo.limits import check_range, check_threads

    check_range("--keep-days", keep_days, 0)
    check_range("--quota", quota, 0)
    check_range("--memory", memory, 0)
    check_range("--first-frame-seconds", first_frame_seconds, 0)
    check_threads(threads)
    find_device(device)


def _need_serve() -> None:
    """Raise ValueError unless what serving needs is installed."""
    for name in ("fastapi", "uvicorn", "sqlalchemy", "fsspec", "prometheus_client", "multipart"):
        if importlib.util.find_spec(name) is None:
            raise ValueError('serving needs more packages: pip install "cogvideo[serve]"')

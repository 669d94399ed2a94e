"""Requests to the server and to the page of a study, given to the applications as a web server would."""

import asyncio
import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=x"}
WORDS = {"content-type": "application/x-www-form-urlencoded"}
VIDEO = {
    "prompt": "a dog runs to the right",
    "seconds": "4",
    "fps": 8,
    "n": 1,
    "seed": 3,
    "guidance_scale": 2,
    "num_frames": 33,
    "size": "192x192",
}
FIELDS = '--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na dog runs\r\n--x--\r\n'
VOTE = {"position": 0, "choice": "", "scores": {}, "seconds": 2}
REQUESTS: dict[str, tuple[str, str, dict[str, str], str]] = {
    "create": ("POST", "/v1/videos", JSON, json.dumps(VIDEO)),
    "form": ("POST", "/v1/videos", FORM, FIELDS),
    "words": ("POST", "/v1/videos", WORDS, "prompt=a+dog+runs&n=1&fps=8"),
    "upload": (
        "POST",
        "/v1/videos",
        JSON,
        '{"prompt": "a", "input_reference": "data:image/png;base64,AAAA"}',
    ),
    "list": ("GET", "/v1/videos?limit=5&order=asc&after=ID", {}, ""),
    "one": ("GET", "/v1/videos/ID", {"authorization": "Bearer x"}, ""),
    "delete": ("DELETE", "/v1/videos/video_1", {}, ""),
    "content": (
        "GET",
        "/v1/videos/ID/content?variant=gif&index=0",
        {"range": "bytes=0-9", "if-range": "x"},
        "",
    ),
    "events": ("GET", "/v1/videos/ID/events", {"last-event-id": "1"}, ""),
    "remix": ("POST", "/v1/videos/ID/remix", JSON, '{"prompt": "a cat"}'),
    "hints": ("GET", "/v1/models/tiny/hints?prompt=a%20dgo", {}, ""),
    "model": ("GET", "/v1/models/tiny", {"accept": "*/*"}, ""),
    "page": ("GET", "/page/app.js", {"if-none-match": "x"}, ""),
    "trial": ("GET", "/judge/api/trial/RATER", {}, ""),
    "vote": ("POST", "/judge/api/vote/RATER", JSON, json.dumps(VOTE)),
    "clip": ("GET", "/judge/clips/0123456789abcdef.mp4", {"range": "bytes=0-9"}, ""),
}


def write(folder: Path) -> None:
    """A folder for each request: its line and headers, and its body."""
    for name, (method, path, headers, body) in REQUESTS.items():
        (folder / name).mkdir()
        extension = "json" if headers is JSON else "txt"
        row = {"method": method, "path": path, "headers": headers, "length": str(len(body))}
        (folder / name / "request.json").write_text(json.dumps(row))
        (folder / name / f"body.{extension}").write_text(body)


def read(folder: Path, out: Path, write_study: Callable[[Path], None]) -> None:
    """Send the request. AssertionError if the answer is an error of the server, or no error of OpenAI's
    shape."""
    apps, names = _applications(out.parent / "server", write_study)
    try:
        row = json.loads((folder / "request.json").read_bytes())
        method, path, headers = str(row["method"]), str(row["path"]), dict(row["headers"])
        headers.setdefault("content-length", str(row["length"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return  # no client could send it
    body = next((file.read_bytes() for file in folder.glob("body.*") if file.is_file()), b"")
    for name, real in names.items():
        path = path.replace(name, real)
    app = apps["server"]
    if path.startswith("/judge/"):
        app = apps["judge"]
        path = path.removeprefix("/judge")
    status, content = asyncio.run(_ask(app, method, path, headers, body))
    assert 200 <= status < 500, f"{status} {content[:300]!r}"
    if status >= 400 and app is apps["server"] and content:
        assert json.loads(content)["error"]["message"], "an error without a message"


async def _ask(app: Any, method: str, path: str, headers: dict[str, Any], body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer of an ASGI application; the client hangs up after its body."""
    plain, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": plain.encode("utf-8", "replace").decode(),
        "raw_path": plain.encode("utf-8", "replace"),
        "query_string": query.encode("utf-8", "replace"),
        "root_path": "",
        "headers": [
            (k.lower().encode("utf-8", "replace"), str(v).encode("utf-8", "replace"))
            for k, v in headers.items()
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    status = 0
    parts: list[bytes] = []

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)


@lru_cache(1)
def _applications(folder: Path, write_study: Callable[[Path], None]) -> tuple[dict[str, Any], dict[str, str]]:
    """The applications, and what stands for ID and RATER: a finished video and someone who votes."""
    from cogvideo.eval.study import Ballot
    from cogvideo.eval.study_server import build_app as build_judge
    from cogvideo.serve.app import Service, build_app
    from cogvideo.serve.doors import Doors
    from cogvideo.serve.jobs import JobStore, new_id
    from cogvideo.serve.request import Catalogue
    from cogvideo.serve.results import VARIANTS, Results
    from cogvideo.serve.statistics import Statistics

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    catalogue = Catalogue(["tiny"])
    store = JobStore(f"sqlite:///{folder / 'jobs.sqlite'}", max_queue=10**6)
    results = Results(str(folder / "videos"))
    id = new_id()
    store.add(id, catalogue.check({"prompt": "a dog"}), [])
    batch = store.take({"tiny": 1}, 600.0)
    assert batch is not None
    for name in VARIANTS.values():
        results.put(id, name.format(0), b"some bytes of a video")
    store.finish(batch.lease, id, 21)
    write_study(folder)
    rater = Ballot(folder / "pairs").join()
    service = Service(catalogue, store, results, Doors(max_upload=2**20), Statistics(store))
    apps = {"server": build_app(service), "judge": build_judge(folder / "pairs")}
    return apps, {"ID": id, "RATER": rater}

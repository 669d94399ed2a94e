"""The endpoints: OpenAI's videos resource, models, progress as server-sent events, health, metrics, the page.

    POST   /v1/videos                      JSON or a form; queued when it answers
    GET    /v1/videos?limit&after&order
    GET    /v1/videos/ID                   DELETE cancels or forgets it
    GET    /v1/videos/ID/content?variant   video, thumbnail, spritesheet, gif; ranges, ETag
    GET    /v1/videos/ID/events            progress and the frames so far, until it is finished
    POST   /v1/videos/ID/remix             the same again with another prompt
    GET    /v1/models, /v1/models/ID       and /v1/models/ID/hints?prompt

Errors have OpenAI's shape. Nothing of a request reaches the file system: files are found by the job's own
name. Endpoints only read and write the database, so they answer while workers compute.
"""

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from cogvideo.files import parse_json
from cogvideo.generate.cogvideo import CogVideo
from cogvideo.serve import uploads
from cogvideo.serve.doors import HEADERS, Doors, guard
from cogvideo.serve.jobs import COMPLETED, FAILED, QUEUED, Job, JobStore, QueueFull, new_id
from cogvideo.serve.request import Catalogue, Refusal, VideoRequest
from cogvideo.serve.results import VARIANTS, Results
from cogvideo.serve.statistics import Statistics

PAGE = Path(__file__).with_name("page")
FILES = {"app.js", "words.js", "style.css", "icon.svg"}  # of the page
EVENT_SECONDS = 0.25  # between two looks at a job that is watched
QUEUED_SECONDS = 0.5  # and while it waits for its turn
WATCH_SECONDS = 5.0  # previews are drawn for, from each of these on
PING_SECONDS = 15.0
MAX_LIMIT = 100

Variant = Literal["video", "thumbnail", "spritesheet", "gif"]


@dataclass(frozen=True)
class Service:
    """What all endpoints use."""

    catalogue: Catalogue
    store: JobStore
    results: Results
    doors: Doors
    statistics: Statistics

    # -- jobs --

    def create(self, given: dict[str, Any], upload: bytes | None) -> dict[str, Any]:
        """Check and store a request; the object of its job."""
        begin = None
        if upload is not None:
            begin = self._decode(str(given.get("model") or ""), upload)
        request = self.catalogue.check(given, begin.kind if begin else "", begin.frames if begin else 0)
        return self._add(request, begin.data if begin else None, None)

    def remix(self, job: Job, prompt: object) -> dict[str, Any]:
        """The request of a job with another prompt and the same seed."""
        old = job.request
        checked = self.catalogue.check({"model": old.model, "prompt": prompt})
        data = self.results.get(job.id, "input.npz") if old.begin else None
        if old.begin and data is None:
            raise Refusal("the input of this video is gone", None, "expired", 409)
        return self._add(replace(old, prompt=checked.prompt), data, job.id)

    def _decode(self, model: str, upload: bytes) -> uploads.Beginning:
        pipe = self.catalogue.pipeline(model or self.catalogue.default)
        if not isinstance(pipe, CogVideo):
            raise Refusal("input_reference is not supported by this model", "input_reference")
        c = pipe.spec.model
        return uploads.decode(upload, pipe.spec.resolution, pipe.frame_counts[c.frames], c.frames - 1)

    def _add(self, request: VideoRequest, data: bytes | None, remixed: str | None) -> dict[str, Any]:
        warnings = self.catalogue.pipeline(request.model).hints([request.prompt])
        id = new_id()
        if data is not None:
            self.results.put(id, "input.npz", data)
        try:
            return shown(self.store.add(id, request, warnings, remixed))
        except BaseException:
            self.results.remove(id)
            raise

    def find(self, id: str) -> Job:
        job = self.store.get(id) if id.isidentifier() and len(id) < 64 else None
        if job is None:
            raise Refusal(f"no video {id[:64]!r}", "video_id", "not_found", 404)
        return job

    def remove(self, id: str) -> dict[str, Any]:
        job = self.find(id)
        self.store.remove(job.id)
        self.results.remove(job.id)
        return {"id": job.id, "object": "video.deleted", "deleted": True}

    # -- content --

    def content(self, id: str, variant: str, index: int, request: Request) -> Response:
        job = self.find(id)
        if job.status == FAILED:
            raise Refusal(f"the video failed: {job.error_message}", None, job.error_code or "failed", 409)
        if job.status != COMPLETED:
            raise Refusal(
                f"the video is {job.status}; try again when it is completed", None, "not_ready", 409
            )
        if index >= job.request.n:
            raise Refusal(f"index must be below {job.request.n}; got {index}", "index")
        stored = self.results.find(job.id, VARIANTS[variant].format(index))
        if stored is None:
            raise Refusal("the file is gone", None, "not_found", 404)
        etag = f'"{job.id}-{variant}-{index}"'
        headers = {
            "ETag": etag,
            "Accept-Ranges": "bytes",
            "Cache-Control": "private, max-age=86400",
            "Content-Disposition": f'inline; filename="{job.id}-{Path(stored.path).name}"',
        }
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        part = None
        if request.headers.get("if-range", etag) == etag:
            part = byte_range(request.headers.get("range", ""), stored.size)
        if part is None:
            headers["Content-Length"] = str(stored.size)
            body = self.results.read(stored, 0, stored.size)
            return StreamingResponse(body, headers=headers, media_type=stored.media_type)
        first, last = part
        if first > last:
            headers["Content-Range"] = f"bytes */{stored.size}"
            return Response(status_code=416, headers=headers)
        headers["Content-Range"] = f"bytes {first}-{last}/{stored.size}"
        headers["Content-Length"] = str(last - first + 1)
        body = self.results.read(stored, first, last - first + 1)
        return StreamingResponse(body, 206, headers=headers, media_type=stored.media_type)

    # -- events --

    async def events(self, id: str, request: Request) -> AsyncIterator[str]:
        """The object of a job whenever it changes, and its previews, until it is finished."""
        last = ""
        version = 0
        spoke = time.monotonic()
        watched = 0.0
        while not await request.is_disconnected():
            now = time.monotonic()
            if now - watched > WATCH_SECONDS / 2:
                await run_in_threadpool(self.store.watch, id, WATCH_SECONDS)
                watched = now
            job, preview = await run_in_threadpool(self.store.look, id, version)
            if job is None:
                yield event("deleted", {"id": id})
                return
            if preview is not None:
                version = preview.version
                image = base64.b64encode(preview.image).decode()
                yield event("preview", {"frames": preview.frames, "image": f"data:image/webp;base64,{image}"})
                spoke = now
            state = json.dumps(shown(job))
            if state != last:
                last = state
                yield event("progress", shown(job))
                spoke = now
            if job.finished:
                return
            if now - spoke > PING_SECONDS:
                yield ": still here\n\n"
                spoke = now
            await asyncio.sleep(QUEUED_SECONDS if job.status == QUEUED else EVENT_SECONDS)


def shown(job: Job) -> dict[str, Any]:
    """A job as clients see it: OpenAI's video object, and what was asked for besides."""
    request = job.request
    error = None
    if job.status == FAILED:
        error = {"code": job.error_code, "message": job.error_message}

    def whole(seconds: float | None) -> int | None:
        return None if seconds is None else int(seconds)

    return {
        "id": job.id,
        "object": "video",
        "created_at": int(job.created_at),
        "completed_at": whole(job.completed_at),
        "expires_at": whole(job.expires_at),
        "status": job.status,
        "progress": job.progress,
        "model": request.model,
        "prompt": request.prompt,
        "seconds": request.seconds,
        "size": request.size,
        "error": error,
        "remixed_from_video_id": job.remixed_from,
        "stage": job.stage,
        "seed": request.seed,
        "n": request.n,
        "num_frames": request.num_frames,
        "fps": request.fps,
        "guidance_scale": request.guidance_scale,
        "input": request.begin or None,
        "warnings": job.warnings,
    }


def event(name: str, data: object) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """First and last byte of a Range header of one range, the first above the last if there are none; None
    for a header that asks for all, or for something else."""
    unit, _, ranges = header.partition("=")
    first, dash, last = ranges.strip().partition("-")
    if unit.strip() != "bytes" or not dash or "," in ranges:
        return None
    if not all(re.fullmatch("[0-9]{0,18}", part) for part in (first, last)):
        return None
    if first == "":
        if last == "":
            return None
        count = int(last)
        return (max(0, size - count), size - 1) if count else (1, 0)
    end = min(int(last), size - 1) if last else size - 1
    return (int(first), end) if int(first) < size else (1, 0)


async def read_form(request: Request, most: int) -> tuple[dict[str, Any], bytes | None]:
    """The fields and the upload of a request, JSON or a form; Refusal if it is neither."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        try:
            form = await request.form(max_files=1, max_fields=30, max_part_size=most)
        except (MultiPartException, HTTPException, UnicodeDecodeError) as error:
            text = getattr(error, "message", None) or getattr(error, "detail", None) or "it is no form"
            raise Refusal(f"the form cannot be read: {text}", None, "invalid_form") from None
        fields: dict[str, Any] = {}
        upload = None
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name != "input_reference":
                    raise Refusal(f"{name} is a file; only input_reference may be one", name)
                upload = await value.read()
            else:
                fields[name] = value
        return fields, upload
    try:
        body = parse_json(await request.body() or b"{}")
    except ValueError as error:
        raise Refusal(f"the body cannot be read: {error}", None, "invalid_json") from None
    if not isinstance(body, dict):
        raise Refusal("the body must be a JSON object", None, "invalid_json")
    return body, _inline_upload(body)


def _inline_upload(body: dict[str, Any]) -> bytes | None:
    """The input of a JSON request: a data URL, as a text or as {"image_url": ...}."""
    given = body.pop("input_reference", None)
    if isinstance(given, dict):
        given = given.get("image_url") or given.get("video_url")
    if given is None:
        return None
    if not isinstance(given, str) or not given.startswith("data:") or ";base64," not in given:
        raise Refusal(
            "input_reference must be a file of a form, or a data URL (data:image/png;base64,...)",
            "input_reference",
        )
    try:
        return base64.b64decode(given.partition(";base64,")[2], validate=True)
    except ValueError:
        raise Refusal("input_reference is no base64", "input_reference") from None


BODY = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {"type": "string", "minLength": 1, "description": "a sentence about the video"},
        "model": {"type": "string", "description": "one of /v1/models; default: the first"},
        "seconds": {"type": "string", "description": "the length, such as 4"},
        "size": {"type": "string", "description": "WxH, such as 192x192"},
        "seed": {"type": "integer", "minimum": 0, "description": "the same seed gives the same file"},
        "fps": {"type": "number", "description": "frames per second; fewer take fewer rounds"},
        "num_frames": {"type": "integer", "description": "instead of fps"},
        "guidance_scale": {
            "type": "number",
            "minimum": 1,
            "description": "how strongly the prompt is followed",
        },
        "n": {"type": "integer", "minimum": 1, "maximum": 16, "description": "videos, of seeds from seed on"},
    },
}
FORM = {
    **BODY,
    "properties": {
        **BODY["properties"],  # type: ignore[dict-item]
        "input_reference": {
            "type": "string",
            "format": "binary",
            "description": "an image to start with, or a video to continue",
        },
    },
}
CREATE = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": BODY}, "multipart/form-data": {"schema": FORM}},
    }
}
REMIX = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["prompt"],
                    "properties": {"prompt": {"type": "string", "minLength": 1}},
                }
            }
        },
    }
}
REFUSED: dict[int | str, dict[str, Any]] = {
    code: {"description": text}
    for code, text in {
        400: "refused, with the field and the valid choices",
        401: "no valid key",
        404: "unknown",
        409: "not in this state",
        413: "too large",
        422: "not readable",
        429: "the queue is full; see Retry-After",
        503: "database or results cannot be reached",
    }.items()
}


def build_app(service: Service) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(
        title="cogvideo", description="Text to video.", responses=REFUSED, redoc_url=None, docs_url="/docs"
    )
    app.state.service = service
    guard(app, service.doors, service.statistics)
    _add_errors(app)
    _add_videos(app, service)
    _add_models(app, service)
    _add_page(app, service)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> JSONResponse:
        body = {"message": str(error), "type": "rate_limit_error", "param": None, "code": "queue_full"}
        return JSONResponse({"error": body}, 429, {"Retry-After": str(error.retry_after)})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return JSONResponse(Refusal(f"{name}: {first['msg']}", name).body, 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "error")
        body = Refusal(str(error.detail), None, code, error.status_code).body
        return JSONResponse(body, error.status_code, error.headers)


def _add_videos(app: FastAPI, service: Service) -> None:
    @app.post("/v1/videos", openapi_extra=CREATE, tags=["videos"])
    async def create_video(request: Request) -> dict[str, Any]:
        fields, upload = await read_form(request, service.doors.max_upload)
        return await run_in_threadpool(service.create, fields, upload)

    @app.get("/v1/videos", tags=["videos"])
    def list_videos(
        limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        try:
            found, more = service.store.page(limit, after, order == "desc")
        except KeyError:
            raise Refusal(f"no video {after!r:.64}", "after", "not_found", 404) from None
        rows = [shown(job) for job in found]
        return {
            "object": "list",
            "data": rows,
            "has_more": more,
            "first_id": rows[0]["id"] if rows else None,
            "last_id": rows[-1]["id"] if rows else None,
        }

    @app.get("/v1/videos/{video_id}", tags=["videos"])
    def get_video(video_id: str) -> dict[str, Any]:
        return shown(service.find(video_id))

    @app.delete("/v1/videos/{video_id}", tags=["videos"])
    def delete_video(video_id: str) -> dict[str, Any]:
        return service.remove(video_id)

    @app.get("/v1/videos/{video_id}/content", tags=["videos"], response_class=Response)
    def get_content(
        request: Request,
        video_id: str,
        variant: Variant = "video",
        index: Annotated[int, Query(ge=0, le=99)] = 0,
    ) -> Response:
        return service.content(video_id, variant, index, request)

    @app.get("/v1/videos/{video_id}/events", tags=["videos"], response_class=Response)
    def get_events(request: Request, video_id: str) -> Response:
        job = service.find(video_id)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            service.events(job.id, request), headers=headers, media_type="text/event-stream"
        )

    @app.post("/v1/videos/{video_id}/remix", openapi_extra=REMIX, tags=["videos"])
    async def remix_video(request: Request, video_id: str) -> dict[str, Any]:
        fields, _ = await read_form(request, service.doors.max_upload)
        job = await run_in_threadpool(service.find, video_id)
        return await run_in_threadpool(service.remix, job, fields.get("prompt"))


def _add_models(app: FastAPI, service: Service) -> None:
    catalogue = service.catalogue

    @app.get("/v1/models", tags=["models"])
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [catalogue.describe(name) for name in catalogue.names]}

    @app.get("/v1/models/{model}", tags=["models"])
    def get_model(model: str) -> dict[str, Any]:
        return catalogue.describe(model)

    @app.get("/v1/models/{model}/hints", tags=["models"])
    def get_hints(model: str, prompt: Annotated[str, Query(max_length=2000)]) -> dict[str, Any]:
        """Words of a prompt that the model never saw, each with the nearest that it knows."""
        unknown = catalogue.pipeline(model).prompts.unknown_words(prompt)
        return {"object": "hints", "unknown": unknown}


def _add_page(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["server"])
    def health() -> JSONResponse:
        try:
            counts = service.store.counts()
        except Exception:  # of whatever database this is
            return JSONResponse({"status": "no database"}, 503)
        return JSONResponse({"status": "ok", "jobs": counts.by_status})

    @app.get("/metrics", tags=["server"], response_class=Response)
    def metrics() -> Response:
        text, kind = service.statistics.text()
        return Response(text, media_type=kind)

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return FileResponse(PAGE / "index.html", headers=HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    def page(name: str) -> Response:
        if name not in FILES:
            raise Refusal("there is no such page", None, "not_found", 404)
        return FileResponse(PAGE / name, headers=HEADERS)

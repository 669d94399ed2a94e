"""Who may come in, and with how much: keys, sizes, origins, headers."""

import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from cogvideo.files import read_text
from cogvideo.serve.jobs import DatabaseError
from cogvideo.serve.request import Refusal
from cogvideo.serve.statistics import Statistics

log = logging.getLogger("cogvideo.server")

OPEN = ("/", "/page/", "/health", "/docs", "/openapi.json")  # show nothing of anybody
KEYS_VARIABLE = "COGVIDEO_API_KEYS"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
DROPPED = 2**28  # bytes of a body that is too large which are still read
ALWAYS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}


@dataclass(frozen=True)
class Doors:
    keys: tuple[str, ...] = ()  # none: everybody may come in
    max_upload: int = 50 * 2**20  # bytes of a request
    origins: tuple[str, ...] = ()  # of other pages that may call the endpoints

    def knows(self, header: str) -> bool:
        """Whether an Authorization header has one of the keys, in a time that does not tell which."""
        if not self.keys:
            return True
        kind, _, key = header.partition(" ")
        given = key.strip().encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(given, known.encode()) for known in self.keys]
        return kind.lower() == "bearer" and any(matches)


def read_keys(file: Path | None, environment: str) -> tuple[str, ...]:
    """Keys of a file, one on each line, and of the environment, separated by commas."""
    lines = read_text(file).splitlines() if file else []
    keys = [key.strip() for key in (*lines, *environment.split(",")) if key.strip()]
    for key in keys:
        if len(key) < 16:
            raise ValueError("an API key must have 16 characters or more")
    return tuple(keys)


def check_address(host: str, keys: tuple[str, ...], no_auth: bool) -> None:
    """Raise ValueError for an address that others can reach, unless keys or an explicit word allow it."""
    if host not in LOOPBACK and not keys and not no_auth:
        raise ValueError(
            f"--host {host} can be reached by others: give --api-keys FILE or {KEYS_VARIABLE}, "
            "or --no-auth if everybody may generate"
        )


class BodyLimit:
    """Ends a request whose body is too large, whatever its headers say."""

    def __init__(self, app: Any, most: int):
        self.app = app
        self.most = most

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self.most:
            await self._refuse(scope, receive, send)
            return
        taken = 0
        started = False

        async def limited() -> Any:
            """The client hangs up, as far as the endpoint can tell, when its body becomes too large."""
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return {"type": "http.disconnect"} if taken > self.most else message

        async def answer(message: Any) -> None:
            nonlocal started
            if taken <= self.most or started:
                started = True
                await send(message)

        await self.app(scope, limited, answer)
        if not started:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer 413; the body is read and dropped before, for many clients do not listen while they send."""
        dropped = 0
        while dropped < DROPPED:
            message = await receive()
            dropped += len(message.get("body", b""))
            if not message.get("more_body"):
                break
        refusal = Refusal(f"the body may have {self.most} bytes", None, "too_large", 413)
        await JSONResponse(refusal.body, 413, ALWAYS)(scope, receive, send)


def guard(app: FastAPI, doors: Doors, statistics: Statistics) -> None:
    """Put the doors before all endpoints."""

    @app.middleware("http")
    async def enter(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        started = time.perf_counter()
        path = request.url.path
        free = path in OPEN or path.startswith("/page/") or request.method == "OPTIONS"
        if free or doors.knows(request.headers.get("authorization", "")):
            try:
                response = await call_next(request)
            except Exception as error:
                response = _broken(error)
        else:
            refusal = Refusal(
                "a valid key is needed: Authorization: Bearer KEY", None, "invalid_api_key", 401
            )
            response = JSONResponse(refusal.body, 401, {"WWW-Authenticate": "Bearer"})
        for name, value in ALWAYS.items():
            response.headers.setdefault(name, value)
        route = getattr(request.scope.get("route"), "path", "other")
        statistics.count(request.method, route, response.status_code, time.perf_counter() - started)
        return response

    app.add_middleware(BodyLimit, most=doors.max_upload)
    if doors.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(doors.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Range"],
        )


def _broken(error: Exception) -> Response:
    """What a client sees of an error that is not its own: 503 where database or disk are gone, or full."""
    if isinstance(error, Refusal):
        return JSONResponse(error.body, error.status)
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # nobody reads it
    log.error("a request failed", exc_info=error)
    name = type(error).__name__
    if isinstance(error, (DatabaseError, OSError)):
        message = f"the server cannot reach its database or its files just now ({name}); try again"
        refusal = Refusal(message, None, "unavailable", 503)
        return JSONResponse(refusal.body, 503, {"Retry-After": "5"})
    return JSONResponse(Refusal(f"an error of the server: {name}", None, "server_error", 500).body, 500)

"""The page of a study, and the four requests that it makes.

Responses hold random names only: of a rater, of clips, of positions in the rater's own order. No address of a
rater is stored or logged.
"""

from pathlib import Path
from threading import Lock
from typing import Any

from cogvideo.eval.study import QUALITIES, RATER, Ballot
from cogvideo.files import only_writer

PAGE = Path(__file__).with_name("page")
FILES = {"": "judge.html", "judge.js": "judge.js", "judge.css": "judge.css"}
MAX_BODY = 10_000  # bytes
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; media-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def build_app(folder: Path) -> Any:
    """The ASGI application of the study in a folder."""
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import FileResponse, JSONResponse
    except ImportError:
        raise ValueError('the study page needs FastAPI and uvicorn: pip install "cogvideo[eval]"') from None

    ballot = Ballot(folder)
    study = ballot.study
    clips = {clip for trial in study.trials for clip in trial.clips}
    lock = Lock()  # one vote at a time
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Any:
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > MAX_BODY:
            return JSONResponse({"error": "the request is too large"}, 413)
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers[name] = value
        return response

    def refuse(message: str, status: int = 400) -> JSONResponse:
        return JSONResponse({"error": message}, status)

    @app.get("/clips/{name}.mp4")
    def clip(name: str) -> Any:
        if name not in clips:
            return refuse("there is no such clip", 404)
        return FileResponse(folder / "clips" / f"{name}.mp4", media_type="video/mp4")

    @app.post("/api/join")
    def join() -> Any:
        with lock:
            return {"rater": ballot.join()}

    @app.get("/api/trial/{rater}")
    def trial(rater: str) -> Any:
        if not RATER.fullmatch(rater) or rater not in ballot.raters:
            return refuse("this rater is unknown here; start again", 404)
        position = ballot.next_position(rater)
        order = study.order(rater)
        state: dict[str, Any] = {"mode": study.mode, "position": position, "count": len(order)}
        if position < len(order):
            number, _ = order[position]
            state |= {"prompt": study.trials[number].prompt, "clips": study.shown(rater, position)}
            state["qualities"] = QUALITIES if study.mode == "ratings" else {}
        return state

    @app.post("/api/vote/{rater}")
    async def vote(rater: str, request: Request) -> Any:
        try:
            body = await request.json()
            position, choice, scores, seconds = _read_vote(body)
        except (ValueError, RecursionError) as error:
            return refuse(f"the vote cannot be read: {error}")
        if not RATER.fullmatch(rater) or rater not in ballot.raters:
            return refuse("this rater is unknown here; start again", 404)
        try:
            with lock:
                ballot.vote(rater, position, choice, scores, seconds)
        except ValueError as error:
            return refuse(str(error))
        return {"position": ballot.next_position(rater)}

    @app.get("/{name}")
    def page(name: str) -> Any:
        if name not in FILES:
            return refuse("there is no such page", 404)
        return FileResponse(PAGE / FILES[name])

    @app.get("/")
    def index() -> Any:
        return FileResponse(PAGE / FILES[""])

    return app


def _read_vote(body: object) -> tuple[int, str, dict[str, int], float]:
    """Position, choice, scores and seconds of a vote; ValueError for anything else."""
    if not isinstance(body, dict):
        raise ValueError("it is no object")
    position = body.get("position")
    choice = body.get("choice", "")
    scores = body.get("scores", {})
    seconds = body.get("seconds", 0)
    if type(position) is not int or not isinstance(choice, str) or not isinstance(scores, dict):
        raise ValueError("position must be a number, choice a text, scores an object")
    if type(seconds) not in (int, float) or not 0 <= seconds < 1e6:
        raise ValueError("seconds must be a number, 0 or more")
    if not all(isinstance(name, str) and type(score) is int for name, score in scores.items()):
        raise ValueError("scores must be whole numbers")
    return position, choice, scores, float(seconds)


def serve(folder: Path, host: str, port: int) -> None:
    """Serve the page until interrupted. ValueError if another process does."""
    app = build_app(folder)
    import uvicorn

    with only_writer(folder):
        print(f"http://{host}:{port}/", flush=True)
        uvicorn.run(app, host=host, port=port, access_log=False, log_level="warning")

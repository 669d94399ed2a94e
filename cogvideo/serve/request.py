"""What a client asks for, checked against the model before it is queued.

The fields are those of OpenAI's videos resource, with extensions: seed, fps, num_frames, guidance_scale, n.
A refusal names the field and the valid choices, in OpenAI's shape of an error.
"""

import json
import reprlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideo.generate.cogvideo import CogVideo, load
from cogvideo.generate.pipeline import Pipeline

MAX_PROMPT = 2000  # characters
MAX_VIDEOS = 16  # of one job
MAX_SEED = 2**31 - 1
FIELDS = ("prompt", "model", "seconds", "size", "seed", "fps", "num_frames", "guidance_scale", "n")


class Refusal(ValueError):
    """A request that cannot be served; `param` is the field."""

    def __init__(
        self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400
    ):
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class VideoRequest:
    """A request that can be served. A seed is always given, so that every attempt generates the same."""

    model: str
    prompt: str
    seconds: str
    size: str  # "WxH"
    num_frames: int
    fps: float
    n: int = 1
    seed: int | None = None  # None: the model is deterministic
    guidance_scale: float | None = None  # None: the model's own
    begin: str = ""  # "image" or "video": the input that the video starts with
    begin_frames: int = 0  # key frames of it

    @property
    def group(self) -> str:
        """Requests of one group can be generated together."""
        return json.dumps([self.model, self.num_frames, self.guidance_scale, self.begin_frames])

    @staticmethod
    def model_of(group: str) -> str:
        model: str = json.loads(group)[0]
        return model


class Catalogue:
    """The models that are served, opened without their weights. The first is the default."""

    def __init__(self, models: Sequence[str]):
        if not models:
            raise ValueError("--models must name a model")
        self.locations = {Path(model).name: model for model in models}
        if len(self.locations) < len(models):
            raise ValueError(f"two of the models have the same name: {', '.join(models)}")
        self._pipelines: dict[str, Pipeline] = {name: load(at) for name, at in self.locations.items()}
        self.default = next(iter(self.locations))

    @property
    def names(self) -> list[str]:
        return list(self.locations)

    def pipeline(self, name: str) -> Pipeline:
        """The model of this name, for checks; Refusal if there is none."""
        if name not in self._pipelines:
            choices = ", ".join(self.names)
            raise Refusal(f"unknown model {name!r}; choose one of {choices}", "model", "model_not_found", 404)
        return self._pipelines[name]

    def describe(self, name: str) -> dict[str, Any]:
        """A model as `/v1/models` shows it: OpenAI's fields, and what can be asked of it."""
        pipe = self.pipeline(name)
        side = output_side(pipe)
        return {
            "id": name,
            "object": "model",
            "created": int(pipe.folder.path.stat().st_mtime),
            "owned_by": "cogvideo",
            "about": pipe.folder.config.about,
            "size": [f"{side}x{side}"],
            "seconds": sorted({seconds_of(frames, fps) for frames, fps in pipe.frame_counts.items()}),
            "num_frames": sorted(pipe.frame_counts),
            "fps": {str(frames): fps for frames, fps in sorted(pipe.frame_counts.items())},
            "words": list(pipe.folder.config.words),
            "deterministic": not isinstance(pipe, CogVideo),
        }

    def check(self, given: dict[str, Any], begin: str = "", begin_frames: int = 0) -> VideoRequest:
        """The request of given fields; Refusal if it cannot be served."""
        for name in given:
            if name not in FIELDS:
                raise Refusal(
                    f"unknown field {name!r}; choose from {', '.join(FIELDS)}, input_reference", name
                )
        model = _text(given, "model") or self.default
        pipe = self.pipeline(model)
        num_frames, fps = _frames(pipe, _integer(given, "num_frames"), _number(given, "fps"))
        side = output_side(pipe)
        seed = _integer(given, "seed", 0, MAX_SEED)
        request = VideoRequest(
            model=model,
            prompt=_prompt(pipe, given),
            seconds=_one_of(given, "seconds", [seconds_of(num_frames, fps)]),
            size=_one_of(given, "size", [f"{side}x{side}"]),
            num_frames=num_frames,
            fps=fps,
            n=_integer(given, "n", 1, MAX_VIDEOS) or 1,
            seed=secrets.randbelow(MAX_SEED - MAX_VIDEOS) if seed is None else seed,
            guidance_scale=_number(given, "guidance_scale"),
            begin=begin,
            begin_frames=begin_frames,
        )
        return _check_family(pipe, request, seed_given=seed is not None)


def output_side(pipe: Pipeline) -> int:
    """Pixels a side of the videos of a model."""
    spec = pipe.folder.spec()
    refiner = getattr(spec, "refiner", None)
    superres = getattr(spec, "superres", None)
    scale = refiner.scale if refiner else 1
    if superres:
        scale *= superres.scale
    return int(spec.resolution * scale)


def seconds_of(frames: int, fps: float) -> str:
    """Seconds between the first frame and the last, as OpenAI writes them; a single frame is shown for 1."""
    return f"{max((frames - 1) / fps, 1):g}"


def _check_family(pipe: Pipeline, request: VideoRequest, seed_given: bool) -> VideoRequest:
    """What a pipeline of this family refuses, as refusals that name the field."""
    if isinstance(pipe, CogVideo):
        try:
            pipe.check_options(request.num_frames, request.n, request.guidance_scale, bool(request.begin))
        except ValueError as error:
            param = "guidance_scale" if "guidance" in str(error) else "num_frames"
            raise Refusal(str(error), param) from None
        return request
    for name, value, neutral in (
        ("input_reference", request.begin, ""),
        ("guidance_scale", request.guidance_scale, None),
        ("n", request.n, 1),
    ):
        if value != neutral:
            raise Refusal(f"{name} is not supported by {request.model}, which is deterministic", name)
    seed = request.seed if seed_given else 0
    return VideoRequest(**{**vars(request), "seed": seed})


def _prompt(pipe: Pipeline, given: dict[str, Any]) -> str:
    prompt = _text(given, "prompt")
    if not prompt:
        raise Refusal("prompt is missing; write a sentence", "prompt", "missing_required_parameter")
    if len(prompt) > MAX_PROMPT:
        raise Refusal(f"prompt has {len(prompt)} characters; at most {MAX_PROMPT} are possible", "prompt")
    try:
        pipe.check_prompt(prompt)
    except ValueError as error:
        raise Refusal(str(error), "prompt") from None
    return prompt


def _frames(pipe: Pipeline, num_frames: int | None, fps: float | None) -> tuple[int, float]:
    """Frames and fps that belong together; each alone is enough."""
    counts = pipe.frame_counts
    if num_frames is None and fps is not None:
        videos = {rate: frames for frames, rate in sorted(counts.items())}
        if fps not in videos:
            choices = ", ".join(f"{rate:g}" for rate in sorted(videos))
            raise Refusal(f"fps {fps:g} is not possible; choose one of {choices}", "fps")
        num_frames = videos[fps]
    try:
        num_frames = pipe.check_frames(num_frames)
    except ValueError as error:
        raise Refusal(str(error), "num_frames") from None
    if fps is not None and fps != counts[num_frames]:
        raise Refusal(f"{num_frames} frames come at {counts[num_frames]:g} fps; leave fps out", "fps")
    return num_frames, counts[num_frames]


def _one_of(given: dict[str, Any], name: str, choices: list[str]) -> str:
    value = given.get(name)
    if value is None or value == "":
        return choices[0]
    if name == "seconds" and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = f"{value:g}"
    if value not in choices:
        given_as = reprlib.repr(value)
        raise Refusal(f"{name} {given_as} is not possible; choose one of {', '.join(choices)}", name)
    return str(value)


def _text(given: dict[str, Any], name: str) -> str:
    value = given.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Refusal(f"{name} must be a text; got {type(value).__name__}", name, "invalid_type")
    if "\0" in value or any(0xD800 <= ord(letter) < 0xE000 for letter in value):
        raise Refusal(f"{name} has characters that are no text", name)
    return value.strip()


def _number(given: dict[str, Any], name: str) -> float | None:
    """A finite number, which a form sends as text."""
    value = given.get(name)
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Refusal(f"{name} must be a number; got {reprlib.repr(value)}", name, "invalid_type") from None
    if not abs(number) <= 1e9:
        raise Refusal(f"{name} must be a finite number; got {reprlib.repr(value)}", name)
    return number


def _integer(
    given: dict[str, Any], name: str, least: int | None = None, most: int | None = None
) -> int | None:
    number = _number(given, name)
    if number is None:
        return None
    if number != int(number):
        raise Refusal(f"{name} must be a whole number; got {number:g}", name)
    if (least is not None and number < least) or (most is not None and number > most):
        raise Refusal(f"{name} must be from {least} to {most}; got {number:g}", name)
    return int(number)

"""cogvideo models, push and convert: model folders, described, published and made of the original's files."""

from pathlib import Path
from typing import Literal

from cogvideo.cli.parsing import Positional


def models(model: Positional[str | None] = None, /) -> None:
    """List the shipped models, or describe one: its sizes, words and measured numbers."""
    from cogvideo.model.folder import ModelFolder, find_model, shipped

    if model is None:
        for name in shipped():
            print(f"{name:<12} {ModelFolder(find_model(name)).config.about}")
        return
    folder = ModelFolder(find_model(model))
    config = folder.config
    spec = config.spec
    size = spec.resolution
    refined = f", refined to {size * spec.refiner.scale} px" if spec.refiner else ""
    print(f"{folder.path}\n{config.about}\n")
    for name, value in spec.describe().items():
        print(f"{name:<13} {value}")
    print(f"pixels        {size} px{refined}")
    for part in spec.parts:
        weight = f"{folder.file(part).stat().st_size / 1e6:.1f} MB" if folder.has(part) else "missing"
        print(f"{part:<13} {weight}")
    for name, row in (config.trained or {}).items():
        print(f"trained       {name}: {row.steps} steps of {row.batch} clips")
    for name, value in config.measured.items():
        print(f"measured      {name}: {value}")
    if config.words:
        print(f"words         {' '.join(config.words)}")


def push(
    folder: Positional[Path],
    name: Positional[str],
    /,
    licence: str = "apache-2.0",
    prompt: str | None = None,
    private: bool = False,
    message: str = "cogvideo push",
) -> None:
    """Put a model folder, or an adapter, on the Hugging Face hub, with a card.

    Who you are is known by HF_TOKEN, or by hf auth login.

    Args:
        folder: A model folder, or the folder of an adapter.
        name: The repository, owner/name; owner/name@branch for another branch than main.
        licence: Of the weights, as the hub names it.
        prompt: A sentence of which a video is generated for the card. Default: the card has no picture.
        private: Whether only you can see the repository; when it is created.
        message: Of the commit.
    """
    from cogvideo.generate.publish import prepare
    from cogvideo.model.hub import MODEL_FILES, upload

    prepare(folder, name, licence, prompt)
    print(upload(folder, name, MODEL_FILES, private, message))


def convert(
    kind: Positional[
        Literal["sat", "cogvideo-stage1", "cogvideo-stage2", "cogview2-dsr", "cogview2-itersr", "icetk"]
    ],
    paths: Positional[tuple[Path, ...]],
    /,
    codes: int | None = None,
) -> None:
    """Convert the files of the original CogVideo to a model folder.

    cogvideo convert sat COGVIDEO-STAGE1 COGVIDEO-STAGE2 COGVIEW2-DSR OUT; then, into the same folder:
    cogvideo convert icetk ICETK_MODELS OUT.

    Args:
        kind: sat for checkpoint folders or the zips as downloaded, of any of the models; one of the others
            for those whose model_config.json is missing or does not tell the stage: cogvideo-stage1 and 2,
            CogView2's direct and iterative super-resolution; icetk for ice_text.model and ice_image.pt.
        paths: Folders or zips to read, then the model folder to write or to extend.
        codes: How many of the checkpoint's ids are image codes. Default: 20000, as icetk has.
    """
    from cogvideo.convert.cogvideo import convert_sat
    from cogvideo.convert.icetk import convert_icetk

    *sources, out = paths or (Path("."),)
    if not sources or (kind == "icetk" and len(sources) > 1):
        raise ValueError(
            f"give the files to read, then the folder to write: cogvideo convert {kind} SOURCE OUT"
        )
    if kind == "icetk":
        convert_icetk(sources[0], out)
    else:
        models = {f"cogvideo-stage{number}": f"CogVideoModel of stage {number}" for number in (1, 2)}
        models |= {"cogview2-dsr": "DsrModel", "cogview2-itersr": "ItersrModel"}
        convert_sat(sources, out, codes, model=models.get(kind))
    print(f"model folder: {out}")

"""Make a folder ready for the hub: it is complete, it opens, and it has a card."""

import re
from pathlib import Path

from cogvideo.files import atomic_path
from cogvideo.generate.cogvideo import load
from cogvideo.model import lora
from cogvideo.model.card import adapter_card, front_matter, model_card
from cogvideo.model.folder import ModelError, ModelFolder
from cogvideo.model.hub import HUB_ID
from cogvideo.video import Clip

STRIP = "strip.webp"


def prepare(folder: Path, name: str, licence: str, prompt: str | None) -> None:
    """Check a model folder or an adapter, and write its README.md unless it has one. ValueError for what
    cannot be published."""
    if not re.fullmatch(HUB_ID, name):
        raise ValueError(f"the name of a repository is owner/name; got {name!r}")
    if (folder / lora.FILE).is_file():
        adapter = lora.Adapter.load(folder)
        _write_card(folder, adapter_card(name, adapter.about, licence), licence, adapter=True)
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds neither a model (config.json) nor an adapter ({lora.FILE})")
    model = ModelFolder(folder)
    model.check(model.spec().parts)
    pipe = load(folder)
    if prompt is not None:
        (clip,) = pipe(prompt, seed=0, progress=False)
        step = max(1, (len(clip.frames) - 1) // 4)
        Clip(clip.frames[::step], 1.0, prompt).save(folder / STRIP)
    config = model.config
    how = f"`cogvideo train {config.recipe}`" if config.recipe else "not recorded"
    if config.begun.get("init"):
        how += f", from the weights of {Path(config.begun['init']).name}"
    card = model_card(
        name,
        config,
        model.spec().family,
        how=how,
        data="that of its owner" if config.trained is not None else "not recorded",
        licence=licence,
        limits="it knows what its captions name.",
        strip=STRIP if prompt is not None else "",
    )
    _write_card(folder, front_matter(licence) + card, licence)


def _write_card(folder: Path, card: str, licence: str, adapter: bool = False) -> None:
    """Write a card; one that a user wrote is kept, with what the hub reads before it."""
    file = folder / "README.md"
    if file.exists():
        text = file.read_text(encoding="utf-8")
        if text.startswith("---"):
            return
        card = front_matter(licence, adapter) + text
    with atomic_path(file) as part:
        part.write_text(card, encoding="utf-8")

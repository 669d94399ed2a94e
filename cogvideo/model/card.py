"""Model cards: README.md of a model folder or an adapter, as the hub shows it."""

import json
from collections.abc import Mapping
from pathlib import Path

from cogvideo.model.folder import FolderConfig

FRONT = """---
license: {licence}
library_name: cogvideo
pipeline_tag: text-to-video
tags: [text-to-video, cogvideo{tag}]
---

"""

CARD = """# {name}

{about}{strip}

- **Method**: {method}
- **Data**: {data}
- **Recipe**: {how}
- **Licence**: {licence}. **Limits**: {limits}

| phase | steps | clips a step |
|---|---:|---:|
{phases}

## Measured

{measured}
"""

METHODS = {
    "cogvideo": """CogVideo (Hong et al., 2022) in miniature: a text-to-image transformer as frozen base, a
  temporal channel for key frames and one for interpolation, a VQ-VAE, a video decoder.""",
    "regression": """regression: a text encoder and a video decoder with one embedding, whose places become
  pixels in one pass; trained on pictures, then at 1, then at 8 frames a second; a refiner.""",
}
WORLD = """the tiny world of this project, rendered from a seed: {sprites} animated sprites (Microsoft Fluent
  Emoji, MIT), 12 motions, 10 places, captions in English and Chinese. One in eight (sprite, motion, place)
  triples was held out of all training."""


def front_matter(licence: str, adapter: bool = False) -> str:
    """What the hub reads of a card."""
    return FRONT.format(licence=licence.lower(), tag=", lora" if adapter else "")


def model_card(
    name: str,
    config: FolderConfig,
    family: str,
    how: str,
    data: str,
    licence: str = "Apache-2.0",
    limits: str = "it knows this world and nothing else.",
    strip: str = "",
) -> str:
    """README.md of a model folder, from its config.json. `strip` is the file of a picture."""
    phases = "\n".join(f"| {n} | {row.steps} | {row.batch} |" for n, row in (config.trained or {}).items())
    measured = "\n".join(f"- {what}: {value}" for what, value in config.measured.items())
    return CARD.format(
        name=name,
        about=config.about,
        strip=f"\n\n![frames of a generated video]({strip})" if strip else "",
        method=METHODS[family],
        data=data,
        how=how,
        licence=licence,
        limits=limits,
        phases=phases,
        measured=measured or "nothing yet",
    )


def adapter_card(name: str, about: Mapping[str, str], licence: str) -> str:
    """README.md of an adapter, from its metadata."""
    words = json.loads(about.get("words", "[]"))
    base = about.get("base_model") or "tiny"
    return f"""{front_matter(licence, adapter=True)}# {name}

A low-rank adapter (rank {about.get("rank", "?")}) of `{Path(base).name}`.

    cogvideo generate "..." --lora {name} -o out.mp4

Words of its captions: {", ".join(words) if words else "not known"}
"""

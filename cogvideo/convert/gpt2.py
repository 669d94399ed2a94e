"""Read GPT-2's word embedding, with which a regression model may start."""

import re
from pathlib import Path

from torch import Tensor

from cogvideo.model.folder import HUB_ID, ModelError, from_hub, read_tensor


def read_embedding(where: str) -> Tensor:
    """Return GPT-2's embedding [ids, width] from a safetensors file, a folder with one, or a hub id. Raise
    ModelError if there is none."""
    path = Path(where).expanduser()
    if not path.exists() and re.fullmatch(HUB_ID, where):
        path = from_hub(where, ["model.safetensors"])
    if path.is_dir():
        path = path / "model.safetensors"
    embedding = read_tensor(path, "wte.weight")
    if embedding is None:
        raise ModelError(f"{where} has no tensor wte.weight, the name of GPT-2's embedding")
    return embedding

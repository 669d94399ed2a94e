"""Read GPT-2's word embedding, with which a regression model may start."""

from torch import Tensor

from cogvideo.files import expand_user
from cogvideo.model.folder import ModelError, read_tensor
from cogvideo.model.hub import download, is_hub_id


def read_embedding(where: str) -> Tensor:
    """Return GPT-2's embedding [ids, width] from a safetensors file, a folder with one, or a hub id. Raise
    ModelError if there is none."""
    path = expand_user(where)
    if is_hub_id(where):
        path = download(where, ["model.safetensors"])
    if path.is_dir():
        path = path / "model.safetensors"
    embedding = read_tensor(path, "wte.weight")
    if embedding is None:
        raise ModelError(f"{where} has no tensor wte.weight, the name of GPT-2's embedding")
    return embedding

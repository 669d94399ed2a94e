"""Reads the small copies of goldens: tensors that the original computed with small random weights.

`NAME.npz.xz` is a compressed numpy archive; float32 arrays lie in it as four planes of bytes, which compress
better. `python tests/data/goldens.py FOLDER` makes the copies from the folder of all goldens, with fewer
logits and without what lies between the layers.
"""

import hashlib
import io
import json
import lzma
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent


# what was computed step by step: one step of so many is kept
INFERENCE = {
    "stage1_infer_cached": 9,
    "stage1_infer_guidance": 6,
    "stage1_infer_first_frame": 5,
    "stage1_infer_boost": 5,
    "stage2_infer_cached": 16,
    "stage2_infer_cached_noboost": 16,
}


def read(name: str) -> dict[str, Tensor]:
    with lzma.open(DATA / f"{name}.npz.xz") as file, np.load(io.BytesIO(file.read())) as arrays:
        return {key.removeprefix("planes:"): _read(key, arrays[key]) for key in arrays.files}


def _read(key: str, array: np.ndarray) -> Tensor:
    if not key.startswith("planes:"):
        return torch.from_numpy(array)
    return torch.from_numpy(np.moveaxis(array, 0, -1).copy().view(np.float32)[..., 0])


def write(name: str, tensors: dict[str, Tensor]) -> None:
    arrays = {}
    for key, tensor in tensors.items():
        array = tensor.numpy()
        if array.dtype == np.float32 and array.ndim:
            key, array = f"planes:{key}", np.moveaxis(array[..., None].view(np.uint8), -1, 0)
        arrays[key] = array
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    (DATA / f"{name}.npz.xz").write_bytes(lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def _copy(source: Path) -> None:
    from safetensors.torch import load_file

    folder = source / "ckpt" / "cogvideo-stage1-tiny"  # stage 1's weights are in it, nowhere else
    with zipfile.ZipFile(DATA / "cogvideo-stage1-tiny.zip", "w", zipfile.ZIP_LZMA) as archive:
        for file in sorted(folder.rglob("*.*")) + [folder / "latest"]:
            archive.write(file, file.relative_to(folder.parent))
    # the two ranks hold the same weights in halves: their digests are kept
    folder, kept = source / "ckpt" / "cogvideo-stage1-tiny-mp2", {}
    for rank in range(2):
        states = torch.load(folder / "1000" / f"mp_rank_0{rank}_model_states.pt")["module"]
        kept[rank] = {key: digest(value) for key, value in states.items()}
    (DATA / "cogvideo-stage1-tiny-mp2.json").write_text(json.dumps(kept))
    weights = load_file(source / "weights_stage2.safetensors")
    weights["transformer.position_embeddings.weight"][74:512] = 0  # rows that nothing uses
    weights["transformer.position_embeddings.weight"][912:] = 0
    weights["mixins.extra_position_embedding.position_embeddings.weight"][1600:] = 0
    write("weights_stage2", weights)
    for case in ("stage1_train_full", "stage1_train_window", "stage2_train_window"):
        tensors = load_file(source / f"{case}.safetensors")
        kept = {key: value.short() for key, value in tensors.items() if key in ("in.tokens", "in.labels")}
        kept["out.logits"] = tensors["out.logits"][:, 64::199]
        named = ("out.loss", "out.log.", "out.grad", "gradnorm.", "grad.mixins.attention_plus.attn")
        kept |= {key: value for key, value in tensors.items() if key.startswith(named)}
        write(case, kept)
    for case, every in INFERENCE.items():
        tensors = load_file(source / f"{case}.safetensors")
        steps = tensors.get("in.kept_steps")
        steps = torch.arange(tensors["out.step_logits"].shape[1]) if steps is None else steps
        kept = {"kept": steps[::every].short()}
        for length, row in (("text_len", "in.seq"), ("guider_len", "in.guider_seq")):
            if row in tensors:
                kept[length] = (tensors[row][0] == 317).nonzero()[0, 0]  # start of image
        for key in ("in.teacher_tokens", "in.guider_seq"):
            if key in tensors:
                kept[key] = tensors[key].short()
        for key in ("out.step_logits", "out.guider_logits", "out.guided_logits"):
            if key in tensors:
                kept[key] = tensors[key][:, ::every]
        for key in ("out.prompt_logits", "out.prompt_logits_row0"):
            if key in tensors:
                kept["out.prompt_logits"] = tensors[key][:1, int(kept["text_len"]) :][:, ::19]
        write(case, kept)
    tensors = load_file(source / "sampling.safetensors")
    named = ("topk_normalised", "topk_clusters", "selected_cluster", "token_probs")
    kept = {key: value for key, value in tensors.items() if key.endswith(named)}
    kept["dsr.selected_cluster"] = tensors["in.cluster_labels"][tensors["dsr.token_drawn"]]
    write("sampling", kept | {"logits": tensors["in.logits"], "labels": tensors["in.cluster_labels"].short()})
    tensors = load_file(source / "pipeline_trace.safetensors")
    write("pipeline_trace", {k: v for k, v in tensors.items() if k.startswith(("fill", "dsr.image"))})
    write("weights_vqvae_tiny", load_file(source / "weights_vqvae_tiny.safetensors"))
    tensors = load_file(source / "vqvae_tiny.safetensors")
    named = ("in.image01", "out.ids", "out.decoded01")
    write("vqvae_tiny", {key: value for key, value in tensors.items() if key.startswith(named)})
    shapes = json.loads((source / "icetk_hvqvae_full_shapes.json").read_text())
    (DATA / "icetk_hvqvae_full_shapes.json").write_text(json.dumps(shapes, separators=(",", ":")))


if __name__ == "__main__":
    _copy(Path(sys.argv[1]))

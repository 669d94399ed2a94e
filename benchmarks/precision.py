"""What do int8 and bfloat16 do to the logits of a model?

    python -m benchmarks.precision --model tiny

The logits of every token of unseen rendered clips, teacher-forced, against those in float32: the error as a
share of the logits' spread, the divergence of the distributions (KL, nats) against their entropy, and how
often the likeliest code is the same one. Each stage on frames at the rates that it makes.
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks.adherence import TIMES
from benchmarks.fidelity import captions, trained_sprites, unseen_scenes
from cogvideo import CogVideo
from cogvideo.data.tinyworld import render, sprites
from cogvideo.video import Clip

STAGES = {"image": (1, 1), "stage1": (5, 8), "stage2": (5, 4)}  # frames, and eighths of a second between


@torch.inference_mode()
def logits(pipe: CogVideo, stage: str, clips: list[Clip], prompts: list[str]) -> torch.Tensor:
    """[B, S, V] of the codes of clips, by the model of a stage."""
    c = pipe.spec.model
    layout = c.layout(stage)
    codes = layout.lay(pipe.encode(clips, prompts, range(len(clips))).codes)
    seconds = 4.0 if stage == "image" else (len(clips[0].frames) - 1) / clips[0].fps
    text = pipe._text(stage, prompts, seconds)
    tokens = torch.cat((text, layout.inputs(codes, c.start)), 1)
    return torch.cat([getattr(pipe.parts, stage)(rows, layout) for rows in tokens.split(4)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--count", type=int, default=32)
    arguments = parser.parse_args()
    pipes = {
        dtype: CogVideo.from_pretrained(arguments.model, dtype=dtype)
        for dtype in ("float32", "bfloat16", "int8")
    }
    scenes = unseen_scenes(sprites(trained_sprites(pipes["int8"].folder)), arguments.count, seed=777)
    prompts = captions(scenes)
    print("| model | dtype | error / spread | KL, nats | of entropy | same likeliest % | tokens |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for stage, (frames, apart) in STAGES.items():
        times = TIMES[: 1 + (frames - 1) * apart : apart]
        clips = [Clip(render(scene, times, pipes["int8"].spec.resolution), 8 / apart) for scene in scenes]
        made = {dtype: logits(pipe, stage, clips, prompts) for dtype, pipe in pipes.items()}
        right = made.pop("float32").log_softmax(-1)
        entropy = -(right.exp() * right).sum(-1).mean()
        for dtype, found in made.items():
            found = found.log_softmax(-1)
            error = (found - right).square().mean().sqrt() / right.std(-1).mean()
            divergence = F.kl_div(found, right, log_target=True, reduction="none").sum(-1).mean()
            same = (found.argmax(-1) == right.argmax(-1)).float().mean()
            print(
                f"| {stage} | {dtype} | {error:.4f} | {divergence:.5f} | {entropy:.2f} | {100 * same:.1f} "
                f"| {right.shape[0] * right.shape[1]} |"
            )


if __name__ == "__main__":
    main()

"""The judge of prompt adherence: a small classifier that says which sprite moves how, and where, in a clip.

    python -m benchmarks.classifier --out runs/classifier        trains another (~20 minutes on one core)
    python -m benchmarks.classifier --judge frame                the grey frame judge: frame_judge.py

The one that judges ships with the package (`cogvideo/eval/tinyworld.py`); how it is trained stands in
`cogvideo/eval/judge_training.py`.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import frame_judge
from cogvideo.data.tinyworld import sprites
from cogvideo.eval import judge_training
from cogvideo.eval.tinyworld import HEADS, Classes, ClipClassifier, load

FILE = Path("runs/classifier/classifier.safetensors")


def train(out: Path, names: Sequence[str], steps: int, seed: int = 0) -> ClipClassifier:
    """Train from a fixed seed and save to `out`."""
    torch.manual_seed(seed)
    net = ClipClassifier(len(names))
    begun = time.time()

    def report(step: int, losses: Sequence[float]) -> None:
        numbers = " ".join(f"{name} {loss:.4f}" for name, loss in zip(HEADS, losses))
        print(f"{step}/{steps}  {numbers}  {time.time() - begun:.0f} s", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, out / FILE.name)

    return judge_training.train(net, Classes(tuple(names)), steps, seed=seed, report=report)


def test(net: ClipClassifier, names: Sequence[str], count: int) -> None:
    """Print accuracies on fresh clips."""
    for kind, held_out in (("seen triples", False), ("held-out triples", True)):
        right = judge_training.test(net, Classes(tuple(names)), count, held_out)
        parts = "  ".join(f"{name} {100 * share:.2f} %" for name, share in asdict(right).items())
        print(f"{kind:<17} {parts}  n {count}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="train and test the judge of prompt adherence")
    parser.add_argument(
        "--judge",
        choices=("clip", "frame"),
        default="clip",
        help="clip: of sprite, motion and place; frame: of the sprite in one grey frame",
    )
    parser.add_argument("--out", type=Path, help="default: runs/classifier or runs/judge")
    parser.add_argument("--sprites", type=int, default=96, help="of the clip judge; the other knows all")
    parser.add_argument("--steps", type=int, help="default: 1600 or 4500")
    parser.add_argument("--crops", type=int, help="of the frame judge: steps on crops, default: 3 of 4")
    parser.add_argument("--init", type=Path, help="of the frame judge: weights to start from")
    parser.add_argument(
        "--count", type=int, default=1000, help="clips to test on, seen and held-out triples each"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-only", action="store_true", help="test the one in --out")
    args = parser.parse_args()
    args.out = args.out or (FILE.parent if args.judge == "clip" else frame_judge.OUT)
    if args.judge == "frame":
        frame_judge.run(args)
        return
    names = sprites(args.sprites)
    if not args.test_only:
        train(args.out, names, args.steps or 1600, seed=args.seed)
    test(load(args.out / FILE.name), names, args.count)


if __name__ == "__main__":
    main()

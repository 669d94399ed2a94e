"""Does a model understand how people write? 200 phrasings in English and 200 in Chinese, written by hand.

    python -m benchmarks.phrasings --model tiny                 words that the model never saw
    python -m benchmarks.phrasings --model tiny --out runs/phrasings   and its videos, judged

`phrasings.json` has a text, a language and the scene that it asks for: sprite, motion, place, and size or
speed where the text names one. No caption of the training is word for word the same, which
`tests/test_phrasings.py` checks; about half of the scenes are held out. The judge is that of
`benchmarks.adherence`.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from benchmarks import adherence
from cogvideo.data.tinyworld import Scene, sample_scene, sprites
from cogvideo.eval import tinyworld
from cogvideo.eval.tinyworld import SHIPPED
from cogvideo.files import atomic_path
from cogvideo.generate.prompts import Prompts
from cogvideo.model.folder import ModelFolder

FILE = Path(__file__).with_name("phrasings.json")


@dataclass(frozen=True)
class Phrasing:
    """What a person wrote, and the scene that it asks for."""

    text: str
    language: str  # en, zh
    sprite: str
    motion: str
    place: str
    size: str = ""  # small, big or "": nothing is said
    speed: str = ""  # slow, fast or ""

    def scene(self, seed: int) -> Scene:
        """A scene as asked for; its other numbers follow from `seed`."""
        rng = np.random.default_rng(seed)
        fixed = {"sprite": self.sprite, "motion": self.motion, "place": self.place}
        while True:
            scene = sample_scene(rng, (self.sprite,), None, **fixed, varied=True)
            if (scene.bulk, scene.pace) == (self.size, self.speed):
                return scene


@lru_cache(1)
def load() -> tuple[Phrasing, ...]:
    """All phrasings, English first."""
    return tuple(Phrasing(**row) for row in json.loads(FILE.read_text(encoding="utf-8")))


def unknown_words(prompts: Prompts, phrasings: tuple[Phrasing, ...]) -> Counter[str]:
    """How often the phrasings have each word that was in no caption of the training."""
    return Counter(word for one in phrasings for word in prompts.unknown_words(one.text))


def draw_split(language: str, seed: int, names: tuple[str, ...]) -> adherence.Split:
    """The phrasings of a language that are about the sprites `names`, with a scene for each."""
    found = [p for p in load() if p.language == language and p.sprite in names]
    scenes = tuple(p.scene(seed + i) for i, p in enumerate(found))
    return adherence.Split(f"phrasings {language}", scenes, tuple(p.text for p in found))


def main() -> None:
    parser = argparse.ArgumentParser(description="how well a model understands phrasings of people")
    parser.add_argument("--model", default="tiny", help="name, folder or hub id")
    parser.add_argument("--out", type=Path, help="generate videos here and judge them")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int, default=9, choices=(9, 17, 33))
    parser.add_argument("--dtype", help="numbers to compute with; default: as `cogvideo generate`")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--sprites", type=int, help="default: as many as the model was trained on")
    parser.add_argument("--judge", type=Path, default=SHIPPED, help="weights of the classifier")
    args = parser.parse_args()
    from cogvideo.generate.cogvideo import CogVideo, find_model

    folder = ModelFolder(find_model(args.model))
    prompts = Prompts(folder.text(), folder.config.words)
    for language in ("en", "zh"):
        some = tuple(p for p in load() if p.language == language)
        unknown = unknown_words(prompts, some)
        without = sum(not prompts.unknown_words(p.text) for p in some)
        print(f"{language}: {without} of {len(some)} phrasings have no unknown word")
        print(f"  unknown: {', '.join(f'{word} {count}' for word, count in unknown.most_common())}")
    if args.out is None:
        return
    names, net = sprites(args.sprites or adherence.trained_sprites(folder)), tinyworld.load(args.judge)
    known = len(net.heads["sprite"].bias)
    if len(names) > known:
        raise SystemExit(
            f"the judge knows {known} sprites, not {len(names)}: give --sprites or train another judge"
        )
    pipe = CogVideo(folder, dtype=args.dtype)
    adherence.claim(args.out, folder, seed=args.seed, batch=args.batch, frames=args.frames, dtype=pipe.dtype)
    verdicts = {}
    for language in ("en", "zh"):
        split = draw_split(language, args.seed, names)
        clips = adherence.generate(pipe, split, args.seed, args.batch, args.frames, args.out)
        others = adherence.draw_split("others", names, len(split.scenes), args.seed + 5000, None, language)
        judged = adherence.judge_split(net, split, others.scenes, generated=clips)
        assert judged.generated is not None
        verdicts |= {split.name: judged.generated, f"{split.name}: rendered": judged.rendered}
    text = f"# {args.model}: phrasings\n\n{adherence.accuracy_table(verdicts)}\n"
    print(text)
    with atomic_path(args.out / "report.md") as part:
        part.write_text(text)


if __name__ == "__main__":
    main()

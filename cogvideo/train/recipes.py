"""The curriculum as data (CogVideo sections 3.1 and 4): a recipe is a row of phases, each a model, its clips
and its schedule.

    crops       frames to codes: windows around the object, where the detail is
    tokenizer   the same on whole frames
    image       text to the first frame of a clip; what it learns becomes the frozen base
    stage1      the temporal channel for key frames, 1, 2 or 4 a second, told apart by the duration prompt
    stage2      the temporal channel that fills in frames between given ones, at 2, 4 and 8 a second
    decoder     codes of a clip to its frames, each with its neighbours and the caption: windows, as above
    mistakes    the same on whole frames, with some codes replaced by what the stages would sample

and of the regression family, whose one model all phases train:

    image       text to the first frame of a clip
    low         every 8th frame
    high        all frames
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from cogvideo.data.cut import ClipSpec
from cogvideo.train import objectives
from cogvideo.train.losses import LossWeights
from cogvideo.train.phase import Phase


@dataclass(frozen=True)
class Recipe:
    name: str
    preset: str  # row of the table of models
    phases: tuple[Phase, ...]
    sprites: int = 32  # of the tiny world, when that is the data
    pieces: int = 1280  # of the text model that is trained for it; 0: GPT-2's words
    seed: int = 1

    def phase(self, name: str) -> Phase:
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise ValueError(
            f"no phase {name!r} in the recipe {self.name}; its phases are "
            f"{', '.join(p.name for p in self.phases)}"
        )

    def some(self, names: Sequence[str]) -> list[Phase]:
        """The phases with these names, in the order of the recipe; all if there are no names. ValueError for
        an unknown one."""
        for name in names:
            self.phase(name)
        return [phase for phase in self.phases if not names or phase.name in names]

    def changed(self, values: dict[str, str]) -> "Recipe":
        """With fields of phases set, as in {"image.steps": "100", "tokenizer.loss.temporal": "0"}. Only
        numbers and words can be set; each is parsed by the type of its present value."""
        changed = self
        for key, value in values.items():
            name, _, what = key.partition(".")
            phase = changed.phase(name)
            known = {f.name: getattr(phase, f.name) for f in fields(phase)[1:]}
            known |= {f"loss.{f.name}": getattr(phase.loss, f.name) for f in fields(phase.loss)}
            kinds = {name: type(now) for name, now in known.items() if type(now) in (int, float, str)}
            if what not in kinds:
                raise ValueError(
                    f"a phase has no field {what!r} that can be set; choose one of {', '.join(kinds)}"
                )
            try:
                typed = kinds[what](value)
            except ValueError:
                raise ValueError(f"--{key} needs {kinds[what].__name__}, got {value!r}") from None
            if what.startswith("loss."):
                what, typed = "loss", replace(phase.loss, **{what.removeprefix("loss."): typed})
            new = replace(phase, **{what: typed})
            new = replace(new, epochs=0) if what == "steps" else new
            changed = replace(changed, phases=tuple(new if p is phase else p for p in changed.phases))
        return changed


def regression(
    name: str,
    clips: ClipSpec,
    *,
    batch: int,
    lr: float,
    steps: int = 1,
    epochs: int = 0,
    optimizer: str = "adamw",
) -> Phase:
    """A phase of the regression family; it starts from the previous phase's weights."""
    return Phase(
        name,
        objectives.RegressionObjective(),
        trains=("regression",),
        uses=(),
        clips=clips,
        steps=steps,
        batch=batch,
        lr=lr,
        epochs=epochs,
        optimizer=optimizer,
        drop=0.0,
    )


REFERENCE = (  # of the regression family
    regression("image", ClipSpec(4, (1,), keep=1, sizes=(64,)), epochs=10, batch=16, lr=1e-4),
    regression("low", ClipSpec(4, (1,), sizes=(64,)), epochs=10, batch=16, lr=1e-4),
    regression("high", ClipSpec(32, (8,), sizes=(64,)), epochs=10, batch=16, lr=1e-4),
)


def original(name: str, inherits: str, fps: tuple[float, ...], steps: int) -> Phase:
    """A phase of the original (section 4.1, and docs/reference.md): a frozen base, all weights of one channel
    learn. 13 machines with 8 devices each took 4 clips a device."""
    return Phase(
        name,
        objectives.TokenObjective(name),
        trains=(name,),
        uses=("vqvae", "base"),
        clips=ClipSpec(5, fps, sizes=(160,)),
        steps=steps,
        batch=416,
        lr=2e-4,
        inherits=inherits,
        warmup=500,
        schedule="cosine",
        optimizer="adamw",
        weight_decay=1e-4,
        clip=0.1,
        drop=0.0,
    )


RECIPES = {
    "tiny": Recipe(
        "tiny",
        "tiny",
        (
            Phase(
                "crops",
                objectives.TokenizerObjective(),
                trains=("vqvae",),
                uses=(),
                clips=ClipSpec(1, (8,), sizes=(192,), crop=96, cover=48),
                steps=5000,
                batch=32,
                lr=1e-3,
                warmup=100,
                decay=0.0,
                optimizer="adamw",
                weight_decay=0.0,
                perturb=0.1,
                object_weight=4.0,
                loss=LossWeights(perceptual=0.2, temporal=0.0),
            ),
            Phase(
                "tokenizer",
                objectives.TokenizerObjective(),
                trains=("vqvae",),
                uses=(),
                clips=ClipSpec(1, (8,), sizes=(192,), cover=48),
                steps=2000,
                batch=8,
                lr=1e-3,
                warmup=100,
                optimizer="adamw",
                weight_decay=0.0,
                perturb=0.1,
                object_weight=4.0,
                loss=LossWeights(perceptual=0.2, temporal=0.0),
            ),
            Phase(
                "image",
                objectives.TokenObjective("image"),
                trains=("base",),
                uses=("vqvae",),
                clips=ClipSpec(5, (1, 1, 2, 4, 8), keep=1, sizes=(192,), cover=16),
                steps=20000,
                batch=64,
                lr=7e-4,
                crop_share=0.75,
                object_weight=2.0,
            ),
            Phase(
                "stage1",
                objectives.TokenObjective("stage1"),
                trains=("stage1",),
                uses=("vqvae", "base"),
                clips=ClipSpec(5, (1, 1, 1, 1, 1, 1, 2, 4), sizes=(192,), cover=16),
                steps=20000,
                batch=8,
                lr=2e-3,
                inherits="base",
                corrupt=0.05,
                object_weight=2.0,
            ),
            Phase(
                "stage2",
                objectives.TokenObjective("stage2"),
                trains=("stage2",),
                uses=("vqvae", "base"),
                clips=ClipSpec(5, (2, 2, 4, 8), sizes=(192,), cover=16),
                steps=20000,
                batch=8,
                lr=2e-3,
                inherits="stage1",
                corrupt=0.05,
                object_weight=2.0,
            ),
            Phase(
                "decoder",
                objectives.DecoderObjective(),
                trains=("decoder",),
                uses=("vqvae",),
                clips=ClipSpec(5, (8, 8, 8, 4, 2, 1), sizes=(192,), crop=96, cover=48),
                steps=5000,
                batch=8,
                lr=5e-4,
                warmup=100,
                decay=0.0,
                optimizer="adamw",
                weight_decay=0.0,
                inherits="vqvae",
                corrupt=0.1,
                object_weight=4.0,
                loss=LossWeights(perceptual=0.2, temporal=0.02),
            ),
            Phase(
                "mistakes",
                objectives.DecoderObjective(),
                trains=("decoder",),
                uses=("vqvae", "base", "stage1", "stage2"),
                clips=ClipSpec(5, (8, 8, 8, 4, 2, 1), sizes=(192,), cover=48),
                steps=3000,
                batch=2,
                lr=5e-4,
                warmup=100,
                decay=1.0,
                optimizer="adamw",
                weight_decay=0.0,
                inherits="vqvae",
                resample=0.2,
                object_weight=4.0,
                loss=LossWeights(perceptual=0.2, temporal=0.02),
            ),
        ),
        sprites=96,
        pieces=2048,
    ),
    "direct-tiny": Recipe(
        "direct-tiny",
        "direct-tiny",
        (
            regression("image", ClipSpec(5, (1,), keep=1), steps=2000, batch=32, lr=1e-3, optimizer="muon"),
            regression("low", ClipSpec(5, (1,)), steps=2000, batch=8, lr=1e-3, optimizer="muon"),
            regression("high", ClipSpec(33, (8,)), steps=600, batch=4, lr=1e-3, optimizer="muon"),
            Phase(
                "refiner",
                objectives.RefinerObjective(),
                trains=("refiner",),
                uses=(),
                clips=ClipSpec(3, (8,), sizes=(48, 192)),
                steps=1500,
                batch=4,
                lr=5e-4,
                optimizer="adamw",
                weight_decay=0.0,
                loss=LossWeights(perceptual=0.02, temporal=0.02),
            ),
        ),
    ),
    "cogvideo-9b": Recipe(
        "cogvideo-9b",
        "cogvideo-9b",
        (
            original("stage1", inherits="base", fps=(1, 2, 4, 8), steps=76_000),
            original("stage2", inherits="stage1", fps=(2, 4, 8), steps=15_500),
        ),
    ),
    "direct": Recipe("direct", "direct", REFERENCE, pieces=0),
    "direct-gpt2": Recipe("direct-gpt2", "direct-gpt2", REFERENCE, pieces=0),
}


ADAPTERS = {"image": (300, 16), "stage1": (150, 8), "stage2": (150, 8)}  # steps, and clips a step


def of_adapters(recipe: Recipe) -> Recipe:
    """A recipe for low-rank adapters: its phases of transformers, short, by AdamW. ValueError if it has
    none."""
    phases = []
    for phase in recipe.phases:
        if phase.objective.adapts:
            steps, batch = ADAPTERS[phase.name]
            adapting = replace(phase, steps=steps, batch=batch, lr=1e-3, optimizer="adamw", weight_decay=0.0)
            phases.append(replace(adapting, warmup=20, decay=0.5))
    if not phases:
        known = [name for name, row in RECIPES.items() if any(p.objective.adapts for p in row.phases)]
        choices = " or ".join(known)
        raise ValueError(f"the recipe {recipe.name} has no transformer of codes to adapt; choose {choices}")
    return replace(recipe, phases=tuple(phases))


def find(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]

"""A phase of training: which parts learn, from which clips, on which schedule."""

from dataclasses import dataclass, field, replace

from cogvideo.data.cut import Cut
from cogvideo.model.families import Spec
from cogvideo.train.losses import HierarchicalLoss, LossWeights
from cogvideo.train.objectives import Objective
from cogvideo.train.optim import OPTIMIZERS, SCHEDULES, check_optimizer

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Phase:
    name: str
    objective: Objective  # its kind
    trains: tuple[str, ...]  # parts that learn; all others stay as they are
    uses: tuple[str, ...]  # parts that must be there
    cut: Cut
    steps: int
    batch: int  # clips
    lr: float  # peak learning rate
    epochs: int = 0  # if not 0, what decides on the steps; of data that has an end
    inherits: str | None = None  # the part that a new temporal channel starts as a copy of
    warmup: int = 200  # steps
    decay: float = 0.3  # share of the steps, at the end, over which it falls to 0
    schedule: str = "trapezoid"
    optimizer: str = "muon"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # norm of all gradients together
    precision: str = "bfloat16"  # of matrix products; weights stay in float32
    drop: float = 0.1  # share of captions left out
    reuse: int = 1  # token models: times that a clip is used, each time with another caption
    windowed: float = 0.0  # token models: share of clips of which only a window over the object is learnt
    perturb: float = 0.0  # tokenizer: share of codes replaced by near ones
    corrupt: float = 0.0  # token models: share of the codes they read replaced by near ones
    resample: float = 0.0  # decoder: share of codes that the stages sample anew
    object_weight: float = 0.0  # how much more a place counts where the object is
    adversary: float = 0.0  # decoder: weight of a discriminator's opinion
    loss: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        choices = {"precision": PRECISIONS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{self.name}.{name} must be one of {', '.join(known)}; got {value!r}")
        for name in (
            "steps",
            "batch",
            "lr",
            "epochs",
            "warmup",
            "decay",
            "weight_decay",
            "clip",
            "drop",
            "perturb",
            "corrupt",
            "resample",
            "windowed",
            "object_weight",
            "adversary",
            "reuse",
        ):
            least = 1 if name in ("steps", "batch", "reuse") else 0
            if not least <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{self.name}.{name} must be {least} or more, got {value}")
        for name in ("decay", "drop", "perturb", "corrupt", "resample", "windowed"):
            if (value := getattr(self, name)) > 1:
                raise ValueError(f"{self.name}.{name} is a share and must be 1 or less, got {value}")

    def over(self, count: int | None) -> "Phase":
        """With the steps that its epochs are, on `count` videos; ValueError if there is no last one."""
        if not self.epochs:
            return self
        if count is None:
            raise ValueError(
                f"{self.name} takes {self.epochs} epochs, but the data has no end; give --{self.name}.steps"
            )
        return replace(self, steps=max(1, self.epochs * count // self.batch), epochs=0)

    def check(self, spec: Spec) -> None:
        """ValueError unless it can train this model here: its clips are of the right sizes and rates, its
        loss can be computed, and there is its optimizer."""
        size, scale = spec.resolution, spec.refiner.scale if spec.refiner else 1
        due = (size, size * scale)[: len(self.cut.sizes)]
        if self.cut.sizes != due:
            have, want = (" and ".join(map(str, sizes)) for sizes in (self.cut.sizes, due))
            raise ValueError(
                f"{self.name} cuts frames of {have} pixels, but the model's are of {want}; "
                f"choose another preset"
            )
        HierarchicalLoss(self.loss)  # knows its network, and finds the file for it
        check_optimizer(self.optimizer)
        self.objective.check(self, spec)

"""A phase of training: which parts learn, from which clips, on which schedule."""

from dataclasses import dataclass, field, replace

from cogvideo.data.cut import ClipSpec
from cogvideo.limits import check_range
from cogvideo.model.families import Spec
from cogvideo.train import objectives
from cogvideo.train.losses import HierarchicalLoss, LossWeights
from cogvideo.train.optim import OPTIMIZERS, SCHEDULES, check_optimizer

PRECISIONS = ("auto", "float32", "bfloat16")
SHARES = ("decay", "drop", "perturb", "corrupt", "resample", "crop_share")  # fields between 0 and 1
SIZES = (
    "steps",
    "batch",
    "lr",
    "epochs",
    "warmup",
    "weight_decay",
    "clip",
    "object_weight",
    "adversary",
    "reuse",
)
NUMBERS = (*SIZES, *SHARES)  # fields that are not negative


@dataclass(frozen=True)
class Phase:
    name: str
    objective: objectives.Objective  # the kind of phase
    trains: tuple[str, ...]  # parts that learn; all others stay as they are
    uses: tuple[str, ...]  # parts that it needs
    clips: ClipSpec
    steps: int
    batch: int  # clips
    lr: float  # peak learning rate
    epochs: int = 0  # if not 0, sets the number of steps; needs finite data
    inherits: str | None = None  # the part that a new part starts as a copy of
    warmup: int = 200  # steps
    decay: float = 0.3  # share of the steps, at the end, over which the rate falls to 0
    schedule: str = "trapezoid"
    optimizer: str = "muon"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # norm of all gradients together
    precision: str = "auto"  # of matrix products: the faster on the device; weights stay in float32
    drop: float = 0.1  # share of captions that are dropped
    reuse: int = 1  # token models: times that a clip is used, each time with another caption
    crop_share: float = 0.0  # token models: share of clips of which only a window over the object is learnt
    perturb: float = 0.0  # tokenizer: share of codes replaced by near ones
    corrupt: float = 0.0  # token models: share of the codes they read replaced by near ones
    resample: float = 0.0  # decoder: share of codes that the stages sample again
    object_weight: float = 0.0  # how much more a cell counts where the object is
    adversary: float = 0.0  # decoder: weight of a discriminator's opinion
    loss: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        choices = {"precision": PRECISIONS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{self.name}.{name} must be one of {', '.join(known)}; got {value!r}")
        for name in NUMBERS:
            least = 1 if name in ("steps", "batch", "reuse") else 0
            check_range(f"{self.name}.{name}", getattr(self, name), least)
        for name in SHARES:
            if (value := getattr(self, name)) > 1:
                raise ValueError(f"{self.name}.{name} is a share and must be 1 or less, got {value}")

    def over(self, count: int | None) -> "Phase":
        """With the number of steps that its epochs take on `count` videos; ValueError for endless data."""
        if not self.epochs:
            return self
        if count is None:
            raise ValueError(
                f"{self.name} takes {self.epochs} epochs, but the data has no end; give --{self.name}.steps"
            )
        return replace(self, steps=max(1, self.epochs * count // self.batch), epochs=0)

    def check(self, spec: Spec) -> None:
        """Raise ValueError unless the phase can train this model: its clips have the right sizes and frame
        rates, its loss can be computed, and torch has its optimizer."""
        size, scale = spec.resolution, spec.refiner.scale if spec.refiner else 1
        due = (size, size * scale)[: len(self.clips.sizes)]
        if self.clips.sizes != due:
            have, want = (" and ".join(map(str, sizes)) for sizes in (self.clips.sizes, due))
            raise ValueError(
                f"{self.name} cuts frames of {have} pixels, but the model's are of {want}; "
                f"choose another preset"
            )
        HierarchicalLoss(self.loss)  # raises for an unknown network or a missing file
        check_optimizer(self.optimizer)
        self.objective.check(self, spec)

"""The regression family of the package: a sentence to all frames in one pass, by the hierarchical loss."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from benchmarks.rivals.contest import TIMES
from benchmarks.rivals.phased import Part, Phased
from cogvideo.generate.regression import RegressionPipeline
from cogvideo.model import presets
from cogvideo.model.families import RegressionSpec
from cogvideo.video import Clip


class Direct(Phased):
    name = "regression"
    recipe = "direct-tiny"
    plan: ClassVar[tuple[Part, ...]] = (Part("image", 0.25), Part("low", 0.25), Part("high", 0.5))
    learnt = ("regression",)

    @property
    def spec(self) -> RegressionSpec:
        """`direct-tiny` with as many layers, and as wide, as the others."""
        spec = presets.find("direct-tiny")
        assert isinstance(spec, RegressionSpec)
        model = replace(
            spec.regression,
            layers=self.size.layers,
            width=self.size.width,
            heads=max(1, self.size.width // 64),
        )
        return replace(spec, regression=model, refiner=None)

    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Clip]:
        return RegressionPipeline(self.folder).regress(list(captions), len(TIMES))

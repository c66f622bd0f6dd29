"""Trainings of a size that two cores finish in minutes.

Classes, since an option that is given on the command line makes a new object of its class: what
is not given must be the class's own.
"""

from dataclasses import dataclass

from cyclopts import Parameter

from trainer.checks import check
from trainer.training.backbone import Backbone, LoraShape, Tune
from trainer.training.recipe import Recipe
from trainer.training.training import Training


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SmallRecipe(Recipe):
    """A learning rate that 60 steps bear."""

    learning_rate: float = 5e-4
    max_steps: int = 60
    tokens_per_step: int = 3072
    max_length: int = 768
    warmup_steps: int = 10


@dataclass(frozen=True, kw_only=True)
class SmallLora(LoraShape):
    """The adapter of such a training."""

    rank: int = 16


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SmallBackbone(Backbone):
    """The lowest layers, and an adapter."""

    num_layers: int | None = 8
    tune: Tune = "lora"
    lora: SmallLora = SmallLora()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SmallTraining(Training):
    """With more prompts held out."""

    backbone: SmallBackbone
    recipe: SmallRecipe = SmallRecipe()
    holdout: float = 0.1

    def check(self) -> None:
        check(self.holdout > 0, "holdout", self.holdout, "between 0 and 1")
        super().check()

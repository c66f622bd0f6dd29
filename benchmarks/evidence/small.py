"""Trainings of a size that two cores finish in minutes.

Classes, since an option that is given on the command line makes a new object of its class: what
is not given must be the class's own.
"""

from dataclasses import dataclass

from cyclopts import Parameter

from trainer.training.recipe import Recipe
from trainer.training.train import LoraShape


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

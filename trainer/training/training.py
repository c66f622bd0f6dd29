"""All that shapes a value model beside its rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cyclopts import Parameter
from transformers import AutoTokenizer

from trainer.checks import check, check_positions
from trainer.data import THINKING_END, Rollout, ending_at, finished_lengths, split
from trainer.rollout_files import read_rollouts
from trainer.training.ahead import Ahead
from trainer.training.backbone import Backbone, load_config
from trainer.training.objective import Objective
from trainer.training.recipe import Recipe
from value_server.contract.checkpoint import LenvmConfig
from value_server.model.value_model import ValueModel


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Training:
    """All that shapes a value model beside its rollouts."""

    backbone: Backbone
    objective: Objective = Objective()
    ahead: Ahead = Ahead()
    recipe: Recipe = Recipe()
    holdout: float = 0.05
    """Share of the prompts kept for `lenvm evaluate`."""
    thinking_end: str | None = None
    """Token that closes a thinking, as `</think>`: texts then end there, for requests with scope
    thinking. By default they end where the model ended them."""

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        self.objective.check()
        self.ahead.check(self.objective)
        self.recipe.check()
        check(0 <= self.holdout < 1, "holdout", self.holdout, "at least 0 and below 1")
        judged = self.recipe.eval_steps
        check(judged is None or self.holdout > 0, "eval_steps", judged, "left out with holdout 0")
        self.backbone.check()
        model = self.backbone.model
        check_positions(self.recipe.max_length, load_config(model), model)
        half = self.recipe.mixed or self.recipe.fp16 or self.backbone.attention != "flash"
        check(half, "attention", self.backbone.attention, "sdpa or flex without bf16 or fp16")
        self.thinking_end_id()
        if self.recipe.packing and (kind := self.backbone.states()):
            rule = f"left out (--no-packing) with {kind} layers, which carry states between texts"
            check(False, "packing", True, rule)
        if start := self.backbone.started():
            where = f"as {self.backbone.start} has"
            gamma, target = self.objective.gamma, self.objective.target
            check(gamma in (None, start.gamma), "gamma", gamma, f"{start.gamma}, {where}")
            check(target == start.target, "target", target, f"{start.target}, {where}")

    def facts(self) -> dict[str, Any]:
        """What was chosen, for the checkpoint, which has the backbone in its own place."""
        parts = (self.objective, self.ahead, self.recipe)
        facts = {name: value for part in parts for name, value in part.facts().items()}
        own = {"thinking_end": self.thinking_end, THINKING_END: self.thinking_end_id()}
        facts |= own if self.thinking_end else {}
        facts |= {"quantize": self.backbone.quantize} if self.backbone.quantize else {}
        return {"holdout": self.holdout, **facts}

    def thinking_end_id(self) -> int | None:
        """Raises ValueError where the tokenizer has no such token."""
        if self.thinking_end is None:
            return None
        ids = AutoTokenizer.from_pretrained(self.backbone.model).encode(
            self.thinking_end, add_special_tokens=False
        )
        rule = f"one token of {self.backbone.model}, it has {len(ids)}"
        check(len(ids) == 1, "thinking_end", self.thinking_end, rule)
        return int(ids[0])

    def discount(self, part: Sequence[Rollout]) -> float:
        """gamma: of the checkpoint to go on from, or the objective's for these rollouts."""
        start = self.backbone.started()
        return start.gamma if start else self.objective.discount(finished_lengths(part))

    def parts(self, rollouts: Path) -> tuple[list[Rollout], list[Rollout]]:
        """(to learn, held out)."""
        found = read_rollouts(rollouts, self.backbone.tokenizer())
        return split(ending_at(found, self.thinking_end_id()), self.holdout)

    def fresh_model(self, config: LenvmConfig) -> ValueModel:
        """Before any step."""
        dtype = torch.bfloat16 if self.recipe.mixed else torch.float32
        return self.backbone.build(config, dtype)

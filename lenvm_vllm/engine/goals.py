"""What a request wants of a step, from its target, its text and the plugin's settings: its cut,
how many candidates are scored, and where its value should be."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.settings import Settings
from lenvm_vllm.steering.candidates import Cut
from lenvm_vllm.steering.goals import Goals
from lenvm_vllm.steering.landing import Landing

# The mode of a request, not of its aim, which a wall makes a range: the paper knows no wall.
_EXTREMES = {"at_most": -1.0, "at_least": 1.0}


def cut_of(state: RequestState, settings: Settings) -> Cut:
    """The candidate cut of a request: its own, or the plugin's where it sets none."""
    ends = state.ends
    if state.cut is None or state.cut.eos_ids != ends:
        state.cut = _cut_of(state, ends, settings)
    return state.cut


def _cut_of(state: RequestState, ends: list[int], settings: Settings) -> Cut:
    own, min_p = state.own, state.own.min_p
    top_k, top_p = own.top_k, own.top_p
    end_top_k, end_top_p = 0, 0.0
    if state.target.mode == "tilt":
        unset = not top_k and top_p >= 1 and not min_p
        min_p = settings.tilt_min_p if unset else min_p
    else:
        top_k = top_k or settings.top_k
        top_p = top_p if top_p < 1 else settings.top_p
        end_top_k, end_top_p = max(top_k, settings.top_k), max(top_p, settings.top_p)
    # A greedy request is steered at T = 1; vLLM then takes the most probable token.
    temperature = state.temperature or 1.0
    return Cut(temperature, top_k, top_p, min_p, ends, end_top_k, end_top_p)


def shares_of(
    states: Sequence[RequestState], settings: Settings, most_asked: int
) -> tuple[Tensor, Tensor]:
    """(B,) share of each request's candidates, by probability, and (B,) how many are scored.

    most_asked: that the server takes.
    """
    greedy = torch.tensor([state.target.policy == "greedy" for state in states])
    mass = torch.full(greedy.shape, settings.scored_mass, dtype=torch.float64)
    most = torch.full(greedy.shape, settings.max_scored)
    most = most.masked_fill(greedy, settings.max_candidates).clamp(max=most_asked)
    return mass.masked_fill(greedy, 1), most


def landing_in_tokens(state: RequestState) -> Landing[float]:
    """Of a text, from the next token."""
    landing = state.aim.landing
    return replace(landing, target=landing.target - (state.generated + 1))


def goals_of(states: Sequence[RequestState], gamma: float, max_kl: float) -> Goals:
    """What each request wants of this step."""

    targets = [state.target for state in states]
    # (B, 1) tokens so far and the next one
    next_ = np.array([[float(state.generated + 1)] for state in states]).reshape(-1, 1)
    numbers = np.array([state.aim.numbers for state in states], np.float64).reshape(-1, 6)
    numbers[:, 2:4] -= next_  # what remains behind the next token
    exact, tilts, lowest, target, before, behind = torch.from_numpy(numbers).unbind(-1)
    extremes = [_EXTREMES.get(target.mode, 0.0) for target in targets]
    bounds = [max_kl if target.max_kl is None else target.max_kl for target in targets]
    return Goals(
        exact=exact.bool(),
        tilts=tilts.bool(),
        greedy=torch.tensor([target.policy == "greedy" for target in targets]),
        extreme=torch.tensor(extremes, dtype=torch.float64),
        railed=torch.tensor([target.tolerance is not None for target in targets]),
        lowest=lowest,
        landing=Landing(target, before, behind),
        beta=torch.tensor([target.beta or 0.0 for target in targets], dtype=torch.float64),
        max_kl=torch.tensor(bounds, dtype=torch.float64),
        gamma=gamma,
    )

"""One step of one request as Python floats, and `steer` on many at once.

Legend: as in lenvm_vllm.steering.policies.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from lenvm_vllm.steering.constants import (
    LANDING_BEFORE_TARGET,
    LANDING_NATS,
    LANDING_REACH,
)
from lenvm_vllm.steering.goals import Goals
from lenvm_vllm.steering.landing import Landing, landing_of
from lenvm_vllm.steering.policies import steer
from value_server.contract.values import logit_from_length

GAMMA = 0.99


@dataclass(frozen=True)
class Row:
    """One step of one request. q: K probabilities; r: K tokens to come after each candidate;
    closes: places of those that end a sentence."""

    q: tuple[float, ...]
    r: tuple[int, ...]
    p0: float = 0.0
    own_end: bool = True
    mode: str = "equal_to"
    greedy: bool = False
    railed: bool = True
    remaining: int = 10
    width: int = 0
    landing: float = 0.0
    beta: float = 0.0
    max_kl: float = 0.2
    closes: frozenset[int] = frozenset()

    @property
    def u(self) -> list[float]:
        return [1 - GAMMA**r for r in self.r]

    @property
    def own_p0(self) -> float:
        """Of the end by itself."""
        return self.p0 if self.own_end else 0.0

    @property
    def u_star(self) -> float:
        return 1 - GAMMA ** max(self.remaining, 0)

    @property
    def is_short(self) -> bool:
        """Of a limit or a range."""
        return self.remaining > 0 and self.mode in ("at_least", "range")

    @property
    def ceiling(self) -> int:
        """Of a range, whose lower end is `remaining`."""
        return self.remaining + self.width

    @property
    def room(self) -> float:
        return self.ceiling + (self.landing if self.mode == "equal_to" else 0)

    @property
    def span(self) -> float:
        return max(
            self.landing * (1 + LANDING_BEFORE_TARGET if self.mode == "equal_to" else 2), 1e-9
        )

    @property
    def landed(self) -> float:
        return 1 - self.room / self.span

    @property
    def reach(self) -> float:
        """Nats that the values may move the text in this step."""
        landing = self.mode == "equal_to" and 0 <= self.landed <= 1
        return self.max_kl * (LANDING_REACH if landing else 1)

    @property
    def gained(self) -> float:
        """The largest probability of an end that the landing allows."""
        odds = self.p0 / (1 - self.p0) * math.exp(LANDING_NATS * self.landed)
        return odds / (1 + odds)

    @property
    def mean(self) -> float:
        return mean(self.q, self.u)

    def one_sided(self) -> "Row":
        """The mode that a range comes to in this step: a limit that may be broken, or is."""
        if self.remaining > 0 and self.mean < self.u_star:
            return replace(self, mode="at_least", width=0)
        return replace(self, mode="at_most", remaining=self.ceiling, width=0)


def goals_of(rows: list[Row]) -> Goals:
    def column(values: Any) -> torch.Tensor:
        return torch.tensor([float(value) for value in values], dtype=torch.float64)

    landings = [landing_of(row.mode, row.ceiling, row.landing) for row in rows]
    return Goals(
        exact=torch.tensor([row.mode == "equal_to" for row in rows]),
        tilts=torch.tensor([row.mode == "tilt" for row in rows]),
        greedy=torch.tensor([row.greedy for row in rows]),
        extreme=column({"at_most": -1, "at_least": 1}.get(row.mode, 0) for row in rows),
        railed=torch.tensor([row.railed for row in rows]),
        lowest=column(0 if row.mode in ("at_most", "tilt") else row.remaining for row in rows),
        landing=Landing(
            column(landing.target for landing in landings),
            column(landing.before for landing in landings),
            column(landing.behind for landing in landings),
        ),
        beta=column(row.beta for row in rows),
        max_kl=column(row.max_kl for row in rows),
        gamma=GAMMA,
    )


def batched(rows: list[Row]) -> list[tuple[list[float], float]]:
    """`steer` on all rows at once, padded to the widest: (q, p0) of each."""
    width = max(len(row.q) for row in rows)

    def padded(lists: list[Any], fill: float) -> torch.Tensor:
        wide = [[*values, *[fill] * (width - len(values))] for values in lists]
        return torch.tensor(wide, dtype=torch.float64)

    r = padded([row.r for row in rows], 1.0)
    z = logit_from_length(r, GAMMA)
    log_q = padded([row.q for row in rows], 0.0).log()
    z[log_q.isneginf()] = math.nan  # padding must not matter
    log_p0 = torch.tensor([row.p0 for row in rows], dtype=torch.float64).log()
    closes = torch.tensor([[place in row.closes for place in range(width)] for row in rows])
    own_end = torch.tensor([row.own_end for row in rows])
    new_q, new_p0 = steer(log_q, log_p0, own_end, z, closes, goals_of(rows))
    return [
        (q[: len(row.q)], p0)
        for row, q, p0 in zip(rows, new_q.exp().tolist(), new_p0.exp().tolist(), strict=True)
    ]


def mean(q: Any, u: list[float]) -> float:
    return sum(a * b for a, b in zip(q, u, strict=True))


def divergence(new: list[float], old: Any) -> float:
    return sum(a * math.log(a / b) for a, b in zip(new, old, strict=True) if a > 0)

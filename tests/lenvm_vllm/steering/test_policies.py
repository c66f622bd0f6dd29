"""The policies: against the naive version, row by row, and what holds for any row.

Legend: as in lenvm_vllm.steering.policies. The naive version takes one row as Python floats.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenvm_vllm.steering.constants import (
    LANDING_NATS,
    NATURAL,
    SENTENCE,
)
from lenvm_vllm.steering.policies import steer
from tests.support.steering_rows import GAMMA, Row, batched, divergence, goals_of, mean
from value_server.contract.values import logit_from_length

quick = settings(deadline=None, max_examples=60)
NAN = math.nan


MODES = ("equal_to", "at_most", "at_least", "range")


def tilted(q: Any, u: list[float], size: float) -> list[float]:
    highest = max(size * value for value in u)
    weights = [p * math.exp(size * value - highest) for p, value in zip(q, u, strict=True)]
    return [w / sum(weights) for w in weights]


def last_inside(inside: Any, low: float, high: float) -> float:
    """The largest number in [low, high] for which `inside` still holds."""
    if inside(high):
        return high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    return low


def naive_close(row: Row) -> Row:
    """With other odds of the candidates that end a sentence."""
    closing = 1 - (row.room - 1) / row.span
    limit = 1 - GAMMA ** max(row.ceiling, 0)
    gain = 0.0
    if row.mode != "at_least" and 0 <= closing <= 1 and row.mean > limit:
        gain = LANDING_NATS * (0.5 + 1.5 * closing)
    elif row.mode == "equal_to" and closing < 0 and row.room - row.span <= SENTENCE:
        gain = -LANDING_NATS / 2
    if gain == 0 or row.max_kl == 0:
        return row
    weights = [p * math.exp(gain * (i in row.closes)) for i, p in enumerate(row.q)]
    return replace(row, q=tuple(w / sum(weights) for w in weights))


def naive_project(row: Row) -> tuple[list[float], float]:
    return naive_tilt_and_end(naive_close(row))


def naive_tilt_and_end(row: Row) -> tuple[list[float], float]:
    if row.mode == "range":
        q, p0 = naive_tilt_and_end(row.one_sided())
        return q, naive_early_end(row, q) if row.is_short else p0
    u, u_star, due = row.u, row.u_star, row.remaining <= 0
    rises = row.mean < u_star and row.mode != "at_most"
    falls = row.mean > u_star and row.mode != "at_least"
    q = list(row.q)
    if rises or falls:
        sign = 1 if rises else -1

        def inside(size: float) -> bool:
            t = tilted(row.q, u, sign * size)
            return sign * (u_star - mean(t, u)) >= 0 and divergence(t, row.q) <= row.reach

        spread = max(max(u) - min(u), 1e-12)
        q = tilted(row.q, u, sign * last_inside(inside, 0.0, 1e4 / spread))
    if row.p0 == 0 or (due and row.mode == "at_least"):
        return q, row.own_p0
    if row.mode == "at_least":
        return q, naive_early_end(row, q)
    exact = row.mode == "equal_to"
    if row.room < 1:
        return q, 1.0
    if exact and row.landed < 0:
        return q, 0.0
    wanted = max(0.0, 1 - u_star / mean(q, u))
    beyond = mean(q, u) > 1 - GAMMA**row.room
    last = (exact and due) or (row.room < SENTENCE and beyond)
    if last and row.landed >= 0 and row.p0 >= NATURAL:
        return q, 1.0
    if wanted <= row.own_p0:
        return q, row.own_p0 if row.mode == "at_most" else wanted
    return q, row.own_p0 if row.landed < 0 else max(row.own_p0, min(wanted, row.gained))


def naive_early_end(row: Row, q: list[float]) -> float:
    """Of a text that is short yet: barred by its rail, or what leaves the mean at the limit."""
    return 0.0 if row.railed else min(row.own_p0, max(0.0, 1 - row.u_star / mean(q, row.u)))


def naive_greedy(row: Row) -> tuple[list[float] | None, float]:
    """(None, 1.0) where the end is chosen: then q is of no account."""
    p0 = 0.0 if row.railed and row.is_short else row.own_p0
    expected = (1 - p0) * row.mean
    costs = {"equal_to": lambda u: abs(u - row.u_star), "at_most": float, "at_least": float.__neg__}
    if row.mode == "range" and expected < row.u_star:
        cost = costs["at_least"]
    elif row.mode == "range" and expected > 1 - GAMMA ** max(row.ceiling, 0):
        cost = costs["at_most"]
    elif row.mode == "range":
        return list(row.q), p0
    else:
        cost = costs[row.mode]
    best = min(row.u, key=cost)
    if p0 > 0 and cost(0.0) <= cost(best):
        return None, 1.0
    return [float(u == best) for u in row.u], 0.0


def naive_tilt(row: Row) -> tuple[list[float], float]:
    weights = [row.own_p0] + [
        (1 - row.own_p0) * q * math.exp(row.beta * u) for q, u in zip(row.q, row.u, strict=True)
    ]
    rest = sum(weights[1:])
    return [w / rest for w in weights[1:]], weights[0] / sum(weights)


@st.composite
def drawn_rows(draw: st.DrawFn, **fixed: Any) -> Row:
    r = draw(st.lists(st.integers(1, 400), min_size=1, max_size=6, unique=True))
    weights = draw(st.lists(st.integers(1, 1000), min_size=len(r), max_size=len(r)))
    row = Row(
        q=tuple(w / sum(weights) for w in weights),
        r=tuple(r),
        p0=draw(st.sampled_from([0.0, 1e-9, 1e-3, 0.3, 0.99])),
        own_end=draw(st.booleans()),
        railed=draw(st.booleans()),
        mode=(mode := draw(st.sampled_from(MODES))),
        remaining=draw(st.integers(-3, 400)),
        width=draw(st.integers(0, 50)) if mode == "range" else 0,
        landing=draw(st.sampled_from([0.0, 0.7, 6.0, 100.0])),
        closes=frozenset(draw(st.sets(st.integers(0, len(r) - 1)))),
        beta=draw(st.floats(-50, 50)),
        max_kl=draw(st.sampled_from([0.0, 0.01, 0.2, math.inf])),
    )
    return Row(**(vars(row) | fixed))


def close(a: tuple[Any, float], b: tuple[Any, float], tolerance: float = 1e-6) -> None:
    if b[0] is not None:
        assert a[0] == pytest.approx(b[0], abs=tolerance)
    assert a[1] == pytest.approx(b[1], abs=tolerance)


def clear_choice(row: Row) -> bool:
    """No tie between candidates, and none at the limit, that rounding would break."""
    if row.mode == "range":
        other = replace(row, mode="at_most", remaining=row.ceiling, width=0)
        return clear_choice(replace(row, mode="at_least", width=0)) and clear_choice(other)
    costs = sorted(abs(u - row.u_star) for u in [0.0, *row.u])
    tied = any(b - a < 1e-12 for a, b in itertools.pairwise(costs))
    ends = (0.0, row.p0)
    return not tied and all(abs((1 - p0) * row.mean - row.u_star) > 1e-12 for p0 in ends)


@quick
@given(st.lists(drawn_rows(), min_size=1, max_size=5))
def test_project_is_the_naive_one(rows: list[Row]) -> None:
    for row, steered in zip(rows, batched(rows), strict=True):
        close(steered, naive_project(row), 1e-5)


@quick
@given(st.lists(drawn_rows(greedy=True).filter(clear_choice), min_size=1, max_size=5))
def test_greedy_is_the_naive_one(rows: list[Row]) -> None:
    for row, steered in zip(rows, batched(rows), strict=True):
        close(steered, naive_greedy(row))


@quick
@given(st.lists(drawn_rows(mode="tilt"), min_size=1, max_size=5))
def test_tilt_is_the_naive_one(rows: list[Row]) -> None:
    for row, steered in zip(rows, batched(rows), strict=True):
        close(steered, naive_tilt(row))


any_rows = drawn_rows() | drawn_rows(greedy=True).filter(clear_choice) | drawn_rows(mode="tilt")


@quick
@given(any_rows, st.lists(any_rows, max_size=4), st.randoms(use_true_random=False))
def test_neither_company_nor_order_matters(row: Row, company: list[Row], rng: Any) -> None:
    alone = batched([row])[0]
    close(batched([*company, row])[-1], alone, 1e-9)
    order = rng.sample(range(len(row.q)), len(row.q))
    shuffled: dict[str, Any]
    shuffled = {name: tuple(getattr(row, name)[i] for i in order) for name in ("q", "r")}
    shuffled["closes"] = frozenset(new for new, old in enumerate(order) if old in row.closes)
    q, p0 = batched([replace(row, **shuffled)])[0]
    close((q, p0), ([alone[0][i] for i in order], alone[1]), 1e-9)


def test_no_trust_region_is_no_tilt_to_the_last_bit() -> None:
    row = Row(
        q=(0.25, 0.25, 0.5), r=(1, 2, 3), p0=0.0, mode="equal_to", remaining=0, beta=0.0, max_kl=0.0
    )
    assert batched([row])[0] == (pytest.approx(row.q, abs=1e-15), 0.0)


@quick
@given(drawn_rows() | drawn_rows(mode="tilt"), st.data())
def test_a_candidate_without_a_score_counts_with_the_mean(row: Row, data: Any) -> None:
    q = torch.tensor(row.q, dtype=torch.float64)
    blind = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(q), max_size=len(q))))
    blind[data.draw(st.integers(0, len(q) - 1))] = False
    z = logit_from_length(torch.tensor(row.r, dtype=torch.float64), GAMMA)
    share = q.masked_fill(blind, 0)
    log_p0 = torch.tensor([row.p0], dtype=torch.float64).log()
    mean_z = torch.logit((share * z.sigmoid()).sum() / share.sum())
    shape = torch.zeros(1, len(q)).bool()
    rest = (
        log_p0,
        torch.tensor([row.own_end]),
        z.masked_fill(blind, NAN)[None],
        shape,
        goals_of([row]),
    )
    got = steer(q.log()[None], *rest)
    told = steer(q.log()[None], *rest[:2], torch.where(blind, mean_z, z)[None], *rest[3:])
    for a, b in zip(got, told, strict=True):
        torch.testing.assert_close(a.exp(), b.exp(), atol=1e-6, rtol=0)


def test_values_that_only_rounding_tells_apart_do_not_tilt() -> None:
    q = torch.tensor([[0.1, 0.9]], dtype=torch.float64)
    z = logit_from_length(torch.tensor([[50.0, 50.0]], dtype=torch.float64), GAMMA)
    row = Row(q=(0.1, 0.9), r=(0, 0), p0=0.0, mode="equal_to", remaining=5, beta=0.0, max_kl=0.1)
    nobody_ends = torch.full((1,), -torch.inf, dtype=torch.float64)
    z[0, 0] += 1e-14
    own_end, none = torch.ones(1).bool(), torch.zeros(1, 2).bool()
    steered, _ = steer(q.log(), nobody_ends, own_end, z, none, goals_of([row]))
    assert torch.equal(steered, q.log())


@quick
@given(any_rows)
def test_result_is_a_distribution_over_the_candidates(row: Row) -> None:
    q, p0 = batched([row])[0]
    assert sum(q) == pytest.approx(1)
    assert 0 <= p0 <= 1
    assert row.p0 > 0 or p0 == 0


@quick
@given(drawn_rows())
def test_text_stays_in_the_trust_region_and_on_its_side(row: Row) -> None:
    q, p0 = batched([row])[0]
    row = naive_close(row)
    assert divergence(q, row.q) <= row.reach + 1e-9
    low, high = sorted([row.mean, mean(q, row.u)])
    assert not low + 1e-9 < row.u_star < high - 1e-9  # moved up to the target, never past it
    if row.p0 * (1 + 1e-9) < p0 < 1:
        assert 0 <= row.landed < 1
        assert p0 <= row.gained + 1e-12


# ---- the sign of beta


def expected_length(row: Row) -> float:
    q, p0 = batched([row])[0]
    return (1 - p0) * mean(q, list(row.r))


@quick
@given(drawn_rows(mode="tilt", beta=0.0))
def test_beta_zero_changes_nothing(row: Row) -> None:
    close(batched([row])[0], (row.q, row.own_p0), 1e-12)


@quick
@given(drawn_rows(mode="tilt", p0=0.3, own_end=True), st.floats(0.1, 40), st.floats(0.1, 40))
def test_beta_below_zero_shortens_and_above_lengthens(row: Row, down: float, up: float) -> None:
    shorter, same, longer = (
        expected_length(Row(**(vars(row) | {"beta": beta}))) for beta in (-down, 0.0, up)
    )
    assert shorter < same < longer

"""The landing, the ends of sentences in it, and goals that are met already."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from lenvm_vllm.steering.constants import (
    LANDING_NATS,
    LANDING_REACH,
    NATURAL,
    SENTENCE,
)
from tests.support.steering_rows import Row, batched, divergence
from value_server.contract.values import remaining_goal


@pytest.mark.parametrize("p0", [0.0, 0.2])
def test_unaltered_where_the_goal_is_met(p0: float) -> None:
    text: dict[str, Any] = {"q": (0.5, 0.3, 0.2), "r": (20, 40, 60), "p0": p0}
    at_most = Row(mode="at_most", remaining=80, **text)
    at_least = Row(mode="at_least", remaining=10, **text)
    over = Row(mode="at_least", remaining=0, **text)
    assert batched([at_most, over]) == [
        (pytest.approx(list(at_most.q)), pytest.approx(p0)),
        (pytest.approx(list(over.q)), pytest.approx(p0)),
    ]
    # Before at_least's target there is no end; the text stays.
    assert batched([at_least]) == [(pytest.approx(list(at_least.q)), 0.0)]
    # Without rails there may be one, as long as the text is expected to be long enough.
    assert batched([replace(at_least, railed=False)])[0][1] == pytest.approx(p0)
    short = replace(at_least, remaining=35, railed=False, max_kl=0.0)
    assert batched([short])[0][1] <= max(0.0, 1 - short.u_star / short.mean) + 1e-9


def test_the_end_is_forced_past_the_target() -> None:
    text = {"q": (0.5, 0.5), "r": (20, 40), "p0": 1e-6}
    for remaining in (0, -5):
        for mode in ("equal_to", "at_most"):
            for greedy in (False, True):
                row = Row(mode=mode, remaining=remaining, greedy=greedy, **text)
                assert batched([row])[0][1] == 1.0


def landing_row(remaining: int, p0: float, mode: str = "equal_to") -> Row:
    """A text that would go on for long. It lands within 20 tokens: of equal_to from 5 or 6 before
    the target, of a limit up to it."""
    landing = 40 / 3 if mode == "equal_to" else 10
    return Row(q=(0.5, 0.5), r=(200, 300), p0=p0, mode=mode, remaining=remaining, landing=landing)


def end_of(row: Row) -> float:
    return batched([row])[0][1]


def test_no_end_is_brought_about_before_the_landing() -> None:
    assert [end_of(landing_row(r, 0.9)) for r in (90, 7)] == [0.0, 0.0]
    assert [end_of(landing_row(r, 0.01, "at_most")) for r in (90, 21)] == [pytest.approx(0.01)] * 2


@pytest.mark.parametrize(("mode", "start"), [("equal_to", 20 / 3), ("at_most", 20)])
def test_the_odds_of_an_end_gain_from_its_start_to_its_end(mode: str, start: float) -> None:
    """At the start none, and then LANDING_NATS evenly over its 20 tokens."""
    for p0 in (0.04, 1e-6):
        for remaining in (6, 1, -4, -9) if mode == "equal_to" else (20, 15, 10, 5):
            p = end_of(landing_row(remaining, p0, mode))
            gain = math.log(p / (1 - p)) - math.log(p0 / (1 - p0))
            assert gain == pytest.approx(LANDING_NATS * (start - remaining) / 20)
        assert end_of(landing_row(-13 if mode == "equal_to" else 0, p0, mode)) == 1.0


def test_a_likely_end_is_taken_at_the_target_and_where_no_other_sentence_fits() -> None:
    """At the target, or with less than 16 tokens to the last of the landing."""
    assert end_of(landing_row(0, NATURAL)) == 1.0
    assert end_of(landing_row(0, 0.9 * NATURAL)) < 0.6
    for mode, more in ("equal_to", 13), ("at_most", 0):
        assert end_of(landing_row(SENTENCE - 1 - more, NATURAL, mode)) == 1.0
        assert end_of(landing_row(SENTENCE - 1 - more, 0.9 * NATURAL, mode)) < 0.6
        assert end_of(landing_row(SENTENCE - more, NATURAL, mode)) < 0.6
    soon = replace(landing_row(5, 0.3, "at_most"), r=(3, 4))
    assert end_of(soon) == pytest.approx(0.3)  # it ends in time by itself


def test_no_end_is_brought_about_below_a_range() -> None:
    """Nor one that the request's own cut leaves out, though the landing is open."""
    for own_end in (True, False):
        row = replace(landing_row(1, 0.3, "range"), width=5, own_end=own_end)
        assert row.landed > 0
        assert end_of(row) == 0.0


def test_the_text_is_led_to_an_end_in_the_landing_of_equal_to() -> None:
    """There the trust region is larger; behind it, and before a limit, it is not."""
    for mode, remaining, times in [
        ("equal_to", 7, 1),
        ("equal_to", 6, LANDING_REACH),
        ("equal_to", -9, LANDING_REACH),
        ("equal_to", -14, 1),
        ("at_most", 10, 1),
    ]:
        row = replace(landing_row(remaining, 0.0, mode), r=(100, 10**4), max_kl=0.01)
        assert divergence(batched([row])[0][0], row.q) == pytest.approx(0.01 * times)


def closing_odds(remaining: int, mode: str = "equal_to", **more: Any) -> float:
    """Nats that a candidate that ends a sentence gains, of two that are worth the same."""
    fields = {"r": (300, 300), "closes": frozenset({1})} | more
    row = replace(landing_row(remaining, 0.0, mode), **fields)
    q, _ = batched([row])[0]
    return math.log(q[1] / q[0])


def test_a_sentence_ends_in_the_landing_and_not_right_before() -> None:
    """The landing opens 5 tokens before the target, the end stands a token behind."""

    def odds(remaining: int) -> float:
        return closing_odds(remaining, landing=10)

    assert odds(6 + SENTENCE) == 0
    assert [odds(5 + SENTENCE), odds(7)] == [pytest.approx(-LANDING_NATS / 2)] * 2
    assert odds(6) == pytest.approx(LANDING_NATS / 2)
    assert odds(1) == pytest.approx(LANDING_NATS * (1 / 2 + 3 / 2 * 1 / 3))
    assert odds(-9) == pytest.approx(LANDING_NATS * 2)
    assert odds(-10) == 0
    assert closing_odds(1, landing=0) == pytest.approx(2 * LANDING_NATS)  # right before N
    assert closing_odds(2, landing=0) == pytest.approx(-LANDING_NATS / 2)


def test_sentences_are_left_alone_where_nothing_presses() -> None:
    assert closing_odds(21, "at_most") == pytest.approx(LANDING_NATS / 2)
    assert closing_odds(22, "at_most") == 0  # no need to hold a sentence back
    assert closing_odds(5, "at_least") == 0
    assert closing_odds(7, max_kl=0.0) == 0
    assert closing_odds(20, "at_most", r=(3, 3)) == 0  # ends in time by itself


def test_many_chances_of_an_early_end_do_not_add_up() -> None:
    """Texts that would run for hundreds of tokens, each token ending them with 1 in 10,000: at
    the target of 100 most still go on, and all end in the landing or right behind it."""
    rng = random.Random(0)
    ends: list[int] = []
    for t in range(120):
        p0 = end_of(landing_row(remaining_goal(100, t), 1e-4))
        ends += [t + 1 for _ in range(50 - len(ends)) if rng.random() < p0]
    assert min(ends) >= 94
    assert max(ends) <= 114
    assert sum(end > 100 for end in ends) > 45

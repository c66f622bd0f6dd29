"""Guard rails: any model that is driven by them lands inside.

The end-of-sequence token is itself a token: `first` and `last` number completions by
`usage.completion_tokens`.
"""

import contextlib
import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm_vllm.steering.constants import SHORTEST_LANDING
from lenvm_vllm.target.admission import Limits, check_admission, check_limits
from lenvm_vllm.target.rails import Aim, Rails, aim_of, rails_of
from lenvm_vllm.target.request import LengthTarget, LengthTargetError


def rails(mode: str, tokens: int | None = None, tolerance: float | None = 0.1) -> Rails:
    beta = 1.0 if mode == "tilt" else None
    value = {"mode": mode, "tokens": tokens, "tolerance": tolerance, "beta": beta}
    return rails_of(LengthTarget.parse(value))


@pytest.mark.parametrize(
    ("mode", "tokens", "tolerance", "expected"),
    [
        ("equal_to", 200, 0.1, Rails(180, 220)),
        ("equal_to", 200, 0.0, Rails(200, 200)),
        ("equal_to", 1, 0.0, Rails(1, 1)),
        ("equal_to", 1, 0.9, Rails(1, 1)),
        ("equal_to", 3, 0.5, Rails(2, 4)),
        ("equal_to", 10, 1.0, Rails(1, 20)),
        # In binary 100 * (1 - 0.07) is 92.99999999999999 and 100 * (1 + 0.07) is 107.00000000000001
        ("equal_to", 100, 0.07, Rails(93, 107)),
        ("equal_to", 1000, 0.001, Rails(999, 1001)),
        ("equal_to", 100, 0.29, Rails(71, 129)),
        ("equal_to", 200, None, Rails()),
        ("at_most", 150, 0.1, Rails(1, 150)),
        ("at_most", 150, 0.0, Rails(1, 150)),
        ("at_most", 150, None, Rails()),
        ("at_least", 300, 0.1, Rails(300)),
        ("at_least", 300, None, Rails()),
        ("tilt", None, 0.1, Rails()),
    ],
)
def test_rails(mode: str, tokens: int | None, tolerance: float | None, expected: Rails) -> None:
    assert rails(mode, tokens, tolerance) == expected


def test_the_end_counts_as_a_token() -> None:
    three = Rails(first=3, last=3)  # two tokens and the end
    assert [three.suppresses(generated) for generated in range(4)] == [True, True, False, False]
    assert [three.forces(generated) for generated in range(4)] == [False, False, True, True]


def test_rails_of_what_is_left_behind_a_prefix() -> None:
    assert Rails(90, 110).behind(50) == Rails(40, 60)
    assert Rails(90, 110).behind(95) == Rails(1, 15)
    assert Rails(90).behind(100) == Rails()


def length(rails: Rails, limit: int, end: Any) -> int:
    """Completion tokens of a text whose model ends it when `end(generated)` says so."""
    for generated in range(limit):
        may_end = not rails.suppresses(generated)
        if rails.forces(generated) or (may_end and end(generated)):
            return generated + 1
    return limit


@given(
    st.sampled_from(["equal_to", "at_most", "at_least"]),
    st.integers(1, 120),
    st.integers(0, 100),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    st.randoms(use_true_random=False),
)
def test_any_model_lands_inside(
    mode: str, tokens: int, percent: int, eager: float, rng: random.Random
) -> None:
    tolerance = percent / 100
    lands = length(rails(mode, tokens, tolerance), 500, lambda _: rng.random() < eager)
    if mode == "equal_to":
        assert abs(lands - tokens) <= Fraction(percent, 100) * tokens
    else:
        assert lands <= tokens if mode == "at_most" else lands >= tokens


@pytest.mark.parametrize(
    ("rails", "limits", "message"),
    [
        (Rails(180, 220), (179, 0, False), "max_tokens: 179 .* at least 180 tokens"),
        (Rails(300), (1, 0, False), "max_tokens: 1 .* at least 300 tokens"),
        (Rails(180, 220), (None, 221, False), "min_tokens: 221 .* at most 220 tokens"),
        (Rails(last=150), (16, 150, False), "min_tokens: 150 .* at most 150 tokens"),
        (Rails(180, 220), (None, 0, True), "ignore_eos: true contradicts length_target"),
    ],
)
def test_limits_that_contradict(rails: Rails, limits: Any, message: str) -> None:
    with pytest.raises(LengthTargetError, match=message):
        check_limits(rails, Limits(*limits))


@pytest.mark.parametrize(
    ("rails", "limits"),
    [
        (Rails(180, 220), (180, 219, False)),
        (Rails(180, 220), (None, 0, False)),
        (Rails(300), (300, 999, False)),
        (Rails(), (1, 1, False)),
    ],
)
def test_limits_that_agree(rails: Rails, limits: Any) -> None:
    check_limits(rails, Limits(*limits))


# ---- walls: max_tokens and the end of the context


@pytest.mark.parametrize(
    ("target", "wall", "expected"),
    [
        ({"tokens": 200}, None, Aim("equal_to", 200, 200, 20.0, Rails(180, 220))),
        ({"tokens": 200}, 220, Aim("equal_to", 200, 200, 20.0, Rails(180, 220))),
        # In the middle between the lower rail and the wall, as between the rails.
        ({"tokens": 200}, 200, Aim("equal_to", 190, 190, 10.0, Rails(180, 200))),
        ({"tokens": 200}, 185, Aim("equal_to", 182, 182, 3.0, Rails(180, 185))),
        ({"tokens": 200, "tolerance": None}, 200, Aim("equal_to", 190, 190, 10.0, Rails())),
        ({"tokens": 200, "tolerance": 0.0}, 200, Aim("equal_to", 200, 200, 0.0, Rails(200, 200))),
        ({"tokens": 10, "tolerance": 1.0}, 14, Aim("equal_to", 7, 7, 7.0, Rails(1, 14))),
        ({"mode": "at_most", "tokens": 90}, 50, Aim("at_most", 50, 50, 5.0, Rails(1, 50))),
        ({"mode": "at_most", "tokens": 90}, 90, Aim("at_most", 90, 90, 9.0, Rails(1, 90))),
        ({"mode": "at_least", "tokens": 80}, 100, Aim("range", 80, 100, 10.0, Rails(80, 100))),
        ({"mode": "at_least", "tokens": 80}, None, Aim("at_least", 80, 80, 8.0, Rails(80))),
        (
            {"mode": "range", "min_tokens": 30, "max_tokens": 60},
            40,
            Aim("range", 30, 40, 4.0, Rails(30, 40)),
        ),
        ({"mode": "tilt", "beta": 1.0}, 40, Aim("tilt", 0, 0, 0.0, Rails())),
        # A single token is no wall to write before: nobody reads it.
        ({"mode": "at_most", "tokens": 90}, 1, Aim("at_most", 90, 90, 9.0, Rails(1, 90))),
    ],
)
def test_a_target_before_a_wall(target: Any, wall: int | None, expected: Aim) -> None:
    assert aim_of(LengthTarget.parse(target), wall) == expected


@given(st.integers(2, 300), st.integers(0, 100), st.integers(2, 400))
def test_the_landing_ends_before_the_wall(tokens: int, percent: int, wall: int) -> None:
    target = LengthTarget.parse({"tokens": tokens, "tolerance": percent / 100})
    whole, aim = rails_of(target), aim_of(target, wall)
    if wall < whole.first:  # a 400
        return
    assert aim.rails == Rails(whole.first, min(whole.last or 0, wall))
    assert whole.first <= aim.low == aim.high <= tokens
    assert aim.high + int(aim.width) <= wall
    assert aim.width <= aim_of(target).width


@pytest.mark.parametrize(
    ("target", "taken"),
    [
        ({"tokens": 1}, False),
        ({"tokens": 1, "tolerance": None}, False),
        ({"tokens": 1, "tolerance": 1.0}, True),  # up to 2
        ({"mode": "at_most", "tokens": 1}, False),
        ({"mode": "range", "min_tokens": 1, "max_tokens": 1}, False),
        ({"mode": "at_least", "tokens": 1}, True),
        ({"tokens": 2, "tolerance": 0.0}, True),
        ({"tokens": 1, "scope": "thinking"}, True),  # its marker alone: no thinking
        ({"tokens": 1, "scope": "answer"}, False),
    ],
)
def test_a_text_needs_room_for_a_word(target: Any, taken: bool) -> None:
    refused = pytest.raises(
        LengthTargetError, match=r"tokens: 1 is too short: at least 2, a token and the end"
    )
    with contextlib.nullcontext() if taken else refused:
        check_admission(LengthTarget.parse(target), Limits())


@pytest.mark.parametrize(
    ("rails", "before"), [(Rails(50, 50), SHORTEST_LANDING), (Rails(1, 99), 0)]
)
def test_the_landing_has_room_where_a_lower_rail_holds_ends(rails: Rails, before: int) -> None:
    """Not before a wall alone, as of a text in words: nothing could fill it."""
    assert Aim("equal_to", 50, 50, 0.0, rails).landing.before == before

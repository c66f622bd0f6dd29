"""Guard rails: any model that is driven by them lands inside.

The end-of-sequence token is itself a token: `first` and `last` number completions by
`usage.completion_tokens`.
"""

import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm_vllm.rails import Rails, check_limits, rails_of
from lenvm_vllm.request import LengthTarget, LengthTargetError


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
        check_limits(rails, *limits)


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
    check_limits(rails, *limits)

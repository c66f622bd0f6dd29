"""The `length_target` field: what it takes, what it refuses, and its flat form."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm_vllm.steering.constants import DEFAULT_TOLERANCE
from lenvm_vllm.target.request import LengthTarget, LengthTargetError

tokens = st.integers(1, 2**31 - 1)
positive = st.floats(0, 1e6)
common = {
    "tolerance": st.none() | st.floats(0, 1) | st.integers(0, 1),
    "policy": st.sampled_from(["project", "greedy"]),
    "max_kl": st.none() | positive,
    "min_entropy": positive,
    "every": tokens,
    "scope": st.sampled_from(["completion", "thinking", "answer"]),
}
counted = st.fixed_dictionaries(
    {"tokens": tokens},
    optional=common | {"mode": st.sampled_from(["equal_to", "at_most", "at_least"])},
)
tilted = st.fixed_dictionaries(
    {"mode": st.just("tilt"), "beta": st.floats(-1e6, 1e6) | st.integers(-99, 99)}, optional=common
)
ranged = st.fixed_dictionaries(
    {"mode": st.just("range"), "min_tokens": st.integers(1, 9), "max_tokens": st.integers(9, 99)},
    optional=common,
)


def test_a_number_is_an_exact_target() -> None:
    target = LengthTarget.parse(200)
    assert (target.mode, target.tokens, target.policy) == ("equal_to", 200, "project")
    assert target.tolerance == DEFAULT_TOLERANCE


@given(counted | tilted | ranged)
def test_flat_form_comes_back_equal(value: dict[str, Any]) -> None:
    target = LengthTarget.parse(value)
    xargs = target.to_xargs()
    assert all(type(part) in (str, int, float) for part in xargs.values())  # what vLLM lets pass
    assert LengthTarget.from_extra_args({"other": [1], **xargs}) == target


def test_best_of_needs_a_length_to_compare() -> None:
    target = LengthTarget.parse({"tokens": 9, "best_of": 4})
    assert LengthTarget.from_extra_args(target.to_xargs()) == target
    for other in ({"mode": "tilt", "beta": 1.0}, {"tokens": 9, "scope": "answer"}):
        with pytest.raises(LengthTargetError, match=r"length_target\.best_of: 2 needs scope"):
            LengthTarget.parse({**other, "best_of": 2})


def test_a_prefix_is_one_of_the_whole_completion() -> None:
    target = LengthTarget.parse({"tokens": 9, "prefix_tokens": 4})
    assert LengthTarget.from_extra_args(target.to_xargs()) == target
    with pytest.raises(LengthTargetError, match=r"length_target\.prefix_tokens: 4 needs scope"):
        LengthTarget.parse({"tokens": 9, "scope": "answer", "prefix_tokens": 4})


@pytest.mark.parametrize("off", ["off", -1, -0.5])
def test_flat_tolerance_off(off: str | float) -> None:
    target = LengthTarget.from_extra_args({"length_target": 5, "length_tolerance": off})
    assert target == LengthTarget.parse({"tokens": 5, "tolerance": None})


@pytest.mark.parametrize("extra_args", [None, {}, {"kv_transfer_params": 1}])
def test_no_target(extra_args: dict[str, Any] | None) -> None:
    assert LengthTarget.from_extra_args(extra_args) is None


@pytest.mark.parametrize("value", [80, 80.0, "80", "80.0", " 80 ", "8e1"])
def test_eighty_in_other_clothes(value: Any) -> None:
    """Clients send parameters of their own as strings, and some know floats only."""
    eighty = LengthTarget.parse(80)
    assert LengthTarget.parse(value) == LengthTarget.parse({"tokens": value}) == eighty
    assert LengthTarget.from_extra_args({"length_target": value}) == eighty
    assert LengthTarget.parse(json.dumps({"tokens": value})) == eighty


def test_every_number_may_be_a_string() -> None:
    numbers = {
        **{"min_tokens": 7, "max_tokens": 9, "tolerance": 0.25, "max_kl": 0.5},
        **{"min_entropy": 1.5, "every": 2, "best_of": 3, "prefix_tokens": 4},
    }
    given = LengthTarget.parse({"mode": "range", **{k: str(v) for k, v in numbers.items()}})
    assert given == LengthTarget.parse({"mode": "range", **numbers})
    flat = {f"length_{name}": str(value) for name, value in numbers.items()}
    assert LengthTarget.from_extra_args({"length_mode": "range", **flat}) == given
    tilt = LengthTarget.parse({"mode": "tilt", "beta": "-2.5"})
    assert tilt == LengthTarget.parse({"mode": "tilt", "beta": -2.5})
    off = LengthTarget.parse({"tokens": 80, "tolerance": None})
    assert LengthTarget.parse({"tokens": 80, "tolerance": "null"}) == off
    for way in ("off", "-1", -1, "-0.5"):
        args = {"length_target": 80, "length_tolerance": way}
        assert LengthTarget.from_extra_args(args) == off


@pytest.mark.parametrize("tolerance", [1.01, 10, "10"])
def test_a_tolerance_is_a_share(tolerance: Any) -> None:
    named = rf"length_target\.tolerance: {tolerance}.* above 1; it is a share .* 0\.1 is 10%"
    with pytest.raises(LengthTargetError, match=named):
        LengthTarget.parse({"tokens": 100, "tolerance": tolerance})
    with pytest.raises(LengthTargetError, match=named):
        LengthTarget.from_extra_args({"length_target": 100, "length_tolerance": tolerance})
    assert LengthTarget.parse({"tokens": 100, "tolerance": 1}).tolerance == 1


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_units(unit: str) -> None:
    for value, limits in (
        ({unit: 80}, (80, 80)),
        ({unit: "80", "mode": "at_most"}, (80, 80)),
        ({f"min_{unit}": 70, f"max_{unit}": 80, "mode": "range"}, (70, 80)),
    ):
        target = LengthTarget.parse(value)
        assert (target.unit, target.limits) == (unit, limits)
        assert LengthTarget.from_extra_args(target.to_xargs()) == target
    assert LengthTarget.from_extra_args({f"length_{unit}": 80}) == LengthTarget.parse({unit: 80})
    asked = target.in_tokens(lambda amount: 2 * amount)
    assert (asked.unit, asked.limits, asked.mode) == ("tokens", (140, 160), "range")


@pytest.mark.parametrize("unit", ["sentences", "chars"])
def test_what_is_no_unit(unit: str) -> None:
    for ask in (
        lambda: LengthTarget.parse({unit: 8}),
        lambda: LengthTarget.from_extra_args({f"length_{unit}": 8}),
    ):
        with pytest.raises(LengthTargetError, match=rf"{unit}: unknown unit; use .* words.* got 8"):
            ask()


def test_a_prefill_for_another_engine_has_no_length() -> None:
    """Its one token is thrown away; what is wrong is told nevertheless."""
    transfer = {"kv_transfer_params": {"do_remote_decode": True}}
    assert LengthTarget.from_extra_args({"length_target": 80} | transfer) is None
    with pytest.raises(LengthTargetError, match="got 0"):
        LengthTarget.from_extra_args({"length_target": 0} | transfer)
    decode = {"kv_transfer_params": {"do_remote_prefill": True, "do_remote_decode": False}}
    assert LengthTarget.from_extra_args({"length_target": 80} | decode) is not None


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, "eighty", "80 words", "true", "80.5", 80.5, [80], math.nan),
        *("", "NaN", "Infinity", "[80]", "null", "9" * 5000, "[" * 5000),
    ],
)
def test_neither_number_nor_object(value: Any) -> None:
    with pytest.raises(LengthTargetError) as error:
        LengthTarget.parse(value)
    assert "length_target" in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("mode", ["exactly", 1, None, True]),
        ("tokens", [0, -1, 2**31, 1.5, "200 words", "true", True, math.nan, math.inf, [1]]),
        ("tolerance", [-0.1, "0.1 of it", "off", True, math.nan, math.inf]),
        ("policy", ["lazy", None, 0]),
        ("best_of", [0, -1, 65, 2.5, "two", True]),
        ("prefix_tokens", [-1, 2**31, 2.5, "two", True, None]),
        ("max_kl", [-1, "much", False, math.nan, math.inf]),
        ("token", [200]),
    ],
)
def test_bad_part_is_named_with_its_value(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(LengthTargetError) as error:
            LengthTarget.parse({"tokens": 200, field: value})
        assert f"length_target.{field}: " in str(error.value)
        assert f"got {value!r}" in str(error.value)


@pytest.mark.parametrize("beta", ["strong", True, math.nan, -math.inf])
def test_bad_beta(beta: Any) -> None:
    with pytest.raises(LengthTargetError) as error:
        LengthTarget.parse({"mode": "tilt", "beta": beta})
    assert "length_target.beta: " in str(error.value)
    assert f"got {beta!r}" in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "length_target.tokens: required by mode 'equal_to'"),
        ({"mode": "at_most"}, "length_target.tokens: required by mode 'at_most'"),
        ({"tokens": None}, "length_target.tokens: required"),
        ({"mode": "tilt"}, "length_target.beta: required by mode 'tilt'"),
        (
            {"mode": "tilt", "beta": 1, "tokens": 7},
            "length_target.tokens: not allowed with mode 'tilt', got 7",
        ),
        (
            {"mode": "range", "words": 7},
            "length_target.words: not allowed with mode 'range', got 7",
        ),
        ({"mode": "range", "max_words": 7}, "length_target.min_words: required"),
        (
            {"tokens": 7, "words": 5},
            "length_target.words: not allowed with mode 'equal_to' and tokens, got 5",
        ),
        (
            {"characters": 7, "max_words": 5},
            "length_target.max_words: not allowed with mode .* and characters, got 5",
        ),
        (
            {"tokens": 7, "beta": 1.5},
            "length_target.beta: not allowed with mode 'equal_to' and tokens, got 1.5",
        ),
        (
            {"mode": "tilt", "beta": 1, "policy": "landing"},
            "length_target.policy: 'landing' wants no values",
        ),
        (
            {"tokens": 7, "policy": "rails", "tolerance": None},
            "length_target.policy: 'rails' needs a tolerance",
        ),
    ],
)
def test_number_of_the_mode(value: dict[str, Any], message: str) -> None:
    with pytest.raises(LengthTargetError, match=message):
        LengthTarget.parse(value)


def test_all_bad_parts_are_named() -> None:
    with pytest.raises(LengthTargetError, match=r"\.tokens: .* got -1; .*\.policy: .* got 'x'"):
        LengthTarget.parse({"tokens": -1, "policy": "x"})


@pytest.mark.parametrize(
    ("flat", "named"),
    [
        ({"length_tokens": 3}, "length_tokens: unknown field, got 3"),
        ({"length_target": 3, "length_bet": 1}, "length_bet: unknown field, got 1"),
        ({"length_target": "3 words"}, "length_target.tokens: .* got '3 words'"),
        ({"lengthTarget": 3}, "lengthTarget: unknown field, got 3"),
        ({"length_target": True}, "length_target.tokens: .* got True"),
        ({"length_target": 3, "length_tolerance": True}, "tolerance: .* got True"),
        ({"length_target": 3, "length_tolerance": "on"}, "tolerance: .* got 'on'"),
        ({"length_target": 3, "length_tolerance": -math.inf}, None),
        ({"length_mode": "at_least"}, "length_target.tokens: required"),
    ],
)
def test_flat_form_is_checked_too(flat: dict[str, Any], named: str | None) -> None:
    if named is None:
        assert LengthTarget.from_extra_args(flat) == LengthTarget.parse(
            {"tokens": 3, "tolerance": None}
        )
        return
    with pytest.raises(LengthTargetError, match=named):
        LengthTarget.from_extra_args(flat)

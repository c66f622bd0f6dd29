"""Values, logits and lengths: exact without an epsilon, at r = 0 and far beyond any text."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from value_server.contract.values import (
    check_gamma,
    gamma_from_length,
    length_from_logit,
    logit_from_length,
    remaining_goal,
    value_from_length,
    value_from_logit,
)

# A few roundings of z, whose size grows with the logarithm of 1 / (1 - gamma).
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


def tokens(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(100_001, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gamma", [0.9, 0.997, 0.9998])
def test_round_trip_of_every_length(gamma: float, dtype: torch.dtype) -> None:
    r = tokens(dtype)
    z = logit_from_length(r, gamma)
    assert z.dtype == dtype
    assert bool(torch.isfinite(z[1:]).all())
    torch.testing.assert_close(length_from_logit(z, gamma), r, rtol=TOLERANCE[dtype], atol=0)
    assert bool((z.diff() > 0).all())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gamma", [0.9, 0.997, 0.9998])
def test_value_of_logit_is_value_of_length(gamma: float, dtype: torch.dtype) -> None:
    r = tokens(dtype)
    u = value_from_logit(logit_from_length(r, gamma))
    torch.testing.assert_close(u, value_from_length(r, gamma), rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_zero_is_exact(dtype: torch.dtype) -> None:
    r = torch.zeros(1, dtype=dtype)
    z = logit_from_length(r, 0.997)
    assert z.item() == -math.inf
    assert value_from_logit(z).item() == value_from_length(r, 0.997).item() == 0.0
    assert length_from_logit(z, 0.997).item() == 0.0


@given(st.floats(0.5, 0.99999), st.integers(1, 1_000_000))
def test_value_is_one_minus_gamma_to_the_r(gamma: float, r: int) -> None:
    u = value_from_length(torch.tensor(float(r), dtype=torch.float64), gamma).item()
    assert u == pytest.approx(1 - gamma**r, rel=1e-9)


@given(st.floats(0.5, 0.99999), st.floats(-30, 1e6))
def test_round_trip_of_every_logit(gamma: float, z: float) -> None:
    logit = torch.tensor(z, dtype=torch.float64)
    back = logit_from_length(length_from_logit(logit, gamma), gamma)
    torch.testing.assert_close(back, logit, rtol=1e-10, atol=1e-10)


def test_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"negative, got -1\.0"):
        logit_from_length(torch.tensor([3.0, -1.0]), 0.9)


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_gamma_out_of_range(gamma: float) -> None:
    with pytest.raises(ValueError, match=f"gamma .* got {gamma}"):
        check_gamma(gamma)


@given(st.floats(1, 100_000), st.floats(0.01, 0.999))
def test_gamma_gives_the_length_its_mass(length: float, mass: float) -> None:
    gamma = gamma_from_length(length, mass)
    assert value_from_length(torch.tensor(length, dtype=torch.float64), gamma).item() == (
        pytest.approx(mass, rel=1e-6)
    )


def test_gamma_rule_of_the_paper() -> None:
    assert 1 - gamma_from_length(1000) ** 1000 == pytest.approx(0.99)


@pytest.mark.parametrize(("length", "mass"), [(0, 0.99), (-1, 0.99), (10, 0), (10, 1)])
def test_gamma_rule_refuses(length: float, mass: float) -> None:
    with pytest.raises(ValueError, match="length > 0 and 0 < mass < 1"):
        gamma_from_length(length, mass)


@pytest.mark.parametrize("total", [1, 2, 200])
def test_obeying_the_goal_ends_after_exactly_total_tokens(total: int) -> None:
    """The end of sequence is chosen where r* = 0 and is itself the last token counted.

    Comparing with total - generated lands on total + 1, a second slip on total + 2.
    """
    generated = 0
    while remaining_goal(total, generated) != 0:
        generated += 1
    assert generated + 1 == total

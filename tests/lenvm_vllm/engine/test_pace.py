"""How long a step may wait for values."""

from typing import Any

import pytest

from lenvm_vllm.engine.pace import Pace


class Steps:
    """vLLM's own steps, on a clock that stands still while values are waited for."""

    def __init__(self, share: float = 1.0, floor_s: float = 0.0, most_s: float = 100.0) -> None:
        self.now = 0.0
        self.pace = Pace(share, floor_s, most_s, lambda: self.now)
        self.pace.asks()
        self.pace.goes_on()

    def take(self, *seconds: float) -> float:
        """Seconds that may be waited after them."""
        for took in seconds:
            self.now += took
            self.pace.asks()
            self.now += 7.0  # the wait is no part of the step
            self.pace.goes_on()
        return self.pace.wait_s


def test_the_first_step_waits_as_long_as_the_least() -> None:
    assert Pace(1.0, 0.02, 2.0).wait_s == 0.02


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 3.0])
def test_a_share_of_what_a_step_takes(share: float) -> None:
    assert Steps(share).take(0.2) == pytest.approx(share * 0.2)
    assert Steps(share).take(*[0.2] * 50) == pytest.approx(share * 0.2)


def test_the_mean_follows_the_steps() -> None:
    steps = Steps()
    before = steps.take(*[0.1] * 10)
    after = [steps.take(0.15) for _ in range(60)]
    assert before == pytest.approx(0.1)
    assert after == sorted(after)
    assert 0.1 < after[0] < 0.12
    assert after[-1] == pytest.approx(0.15, rel=0.01)


def test_a_pause_counts_as_a_step_of_twice_the_length() -> None:
    usual = [0.1] * 10
    assert Steps().take(*usual, 1e6) == pytest.approx(Steps().take(*usual, 0.2))
    assert Steps(most_s=2.0).take(1e6) < 0.5  # nor is one that comes first taken for a step
    assert Steps(most_s=2.0).take(1e6, *[0.1] * 120) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(("took", "waits"), [(0.001, 0.02), (0.1, 0.1), (9.0, 2.0)])
def test_not_below_the_least_nor_above_the_most(took: Any, waits: float) -> None:
    assert Steps(floor_s=0.02, most_s=2.0).take(*[took] * 40) == pytest.approx(waits)
    assert Steps(floor_s=5.0, most_s=2.0).take(took) == 2.0


def test_a_step_that_asks_nothing_adds_to_the_next_one_and_none_counts_twice() -> None:
    steps = Steps()
    steps.take(0.1)
    steps.pace.asks()
    steps.now += 50.0
    steps.pace.asks()  # has not waited since
    steps.pace.goes_on()
    assert steps.pace.wait_s == pytest.approx(0.1, rel=0.2)

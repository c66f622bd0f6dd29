"""How much goes into a pass: by the budgets of steps, by what failed."""

from value_server.engine.pace import BESIDE, LEAST, MOST_FAILURES, RESTORE, Limits, Pace


class Clock:
    time = 0.0

    def __call__(self) -> float:
        return self.time


def test_a_prefill_takes_half_of_the_smallest_budget() -> None:
    clock = Clock()
    pace = Pace(2048, 512, clock)
    pace.worked(1000, 1.0)
    assert pace.limits() == Limits(2048, 512)
    for budget in (None, 0.0):
        pace.asked(budget)
        assert pace.limits().prefill == 512
    for budget in (0.2, 0.08, 0.1):
        pace.asked(budget)
    assert pace.limits() == Limits(2048, 40, beside=False)
    pace.asked(1e-6)
    assert pace.limits().prefill == LEAST
    clock.time = 0.9
    pace.asked(100.0)
    clock.time = 1.1
    assert pace.limits().prefill == 512  # what is smaller is more than a second ago
    clock.time = 2.2
    pace.asked(1e308)
    assert pace.limits().prefill == 512
    clock.time = 4.0
    assert pace.limits().prefill == 512


def test_a_step_shares_its_pass_with_a_long_prompt_once_in_a_while() -> None:
    pace = Pace(2048, 512, Clock())
    beside = []
    for _ in range(3 * BESIDE):
        pace.asked(0.2)
        beside.append(pace.limits().beside)
        pace.worked(100, 0.1)
    assert sum(beside) == 3
    assert beside[BESIDE]
    assert beside[2 * BESIDE]


def test_the_speed_is_that_of_the_last_passes() -> None:
    pace = Pace(2048, 512, Clock())
    pace.asked(0.2)
    assert pace.limits().prefill == 512  # not known yet
    pace.worked(100, 1.0)
    assert pace.limits().prefill == LEAST
    for _ in range(100):
        pace.worked(100, 0.1)
    assert pace.limits().prefill in (99, 100)


def test_passes_that_fail_become_smaller_and_slowly_larger_again() -> None:
    pace = Pace(256, 128)
    sizes = []
    while not pace.fails(size := pace.limits().tokens):
        sizes.append(size)
    assert sizes == [256, 128, 64, 32, LEAST]
    assert pace.limits() == Limits(LEAST, LEAST, rows=1)
    pace.worked(1, 0.0)
    assert pace.limits() == Limits(LEAST, LEAST)
    for _ in range(RESTORE):
        pace.worked(1, 0.0)
    assert pace.limits() == Limits(32, 32)
    for _ in range(4 * RESTORE):
        pace.worked(1, 0.0)
    assert pace.limits() == Limits(256, 128)


def test_a_small_pass_that_fails_does_not_make_others_smaller() -> None:
    pace = Pace(256, 128)
    assert not pace.fails(9)
    assert pace.limits() == Limits(256, 128, rows=1)
    assert pace.fails(3)


def test_broken_is_what_fails_again_and_again() -> None:
    pace = Pace(256, 128)
    for _ in range(MOST_FAILURES - 1):
        pace.fails(9)
    assert not pace.broken
    pace.worked(9, 0.1)
    for _ in range(MOST_FAILURES):
        assert not pace.broken
        pace.fails(9)
    assert pace.broken
    assert pace.failed == 2 * MOST_FAILURES - 1

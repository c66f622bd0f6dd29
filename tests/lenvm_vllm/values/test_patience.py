"""How long an answer is waited for: by what is usual, and not for one that became slow."""

import pytest

from lenvm_vllm.values.patience import FEW, LATE_ANSWERS, Patience

LEAST, MOST = 0.001, 10.0


def used_to(seconds: float, candidates: int = 16, answers: int = 200) -> Patience:
    """With answers that take so long, a tenth more or less."""
    patience = Patience()
    for number in range(answers):
        patience.note(candidates, seconds * (0.9 + 0.1 * (number % 3)), MOST, late=False)
    return patience


def test_before_anything_is_usual_the_longest_wait() -> None:
    patience = Patience()
    for _ in range(FEW):
        assert patience.seconds(16, LEAST, MOST) == MOST
        patience.note(16, 0.1, MOST, late=False)
    assert patience.seconds(16, LEAST, MOST) < 0.5


def test_a_little_longer_than_usual_within_the_bounds() -> None:
    patience = used_to(0.1)
    assert 0.1 < patience.seconds(16, LEAST, MOST) < 0.3
    assert patience.seconds(16, LEAST, 0.05) == 0.05
    assert patience.seconds(16, 0.5, MOST) == 0.5


@pytest.mark.parametrize(("candidates", "times"), [(4, 1), (16, 1), (31, 1), (32, 2), (500, 16)])
def test_more_candidates_in_proportion_and_fewer_not_less(candidates: int, times: int) -> None:
    patience = used_to(0.1)
    usual = patience.seconds(16, LEAST, MOST)
    assert patience.seconds(candidates, LEAST, MOST) == pytest.approx(times * usual)


def test_waits_do_not_grow_by_themselves() -> None:
    """Answers that take just as long as they may."""
    patience = used_to(0.1)
    begin = patience.seconds(16, LEAST, MOST)
    for _ in range(20):
        wait = patience.seconds(16, LEAST, MOST)
        patience.note(16, wait, wait, late=False)
    assert patience.seconds(16, LEAST, MOST) < 2 * begin


def test_a_server_that_becomes_slow_is_not_waited_for_and_for_good_it_is_in_the_end() -> None:
    patience = used_to(0.1)
    begin = patience.seconds(16, LEAST, MOST)
    for number in range(100):
        assert patience.is_slow == (number >= LATE_ANSWERS)
        patience.note(16, 1.5 * begin, begin, late=True)
    assert patience.seconds(16, LEAST, MOST) < 0.5
    for _ in range(2000):
        patience.note(16, 0.5, begin, late=True)
    assert patience.seconds(16, LEAST, MOST) > 0.5
    patience.note(16, 0.5, 0.6, late=False)
    assert not patience.is_slow


def test_an_answer_that_is_late_by_several_steps_is_waited_for_once() -> None:
    patience = used_to(0.1)
    patience.note(16, 3.0, 0.2, late=True)
    assert patience.is_slow
    patience.note(16, 0.1, 0.2, late=False)
    assert not patience.is_slow


def test_another_server_is_not_judged_by_the_last_one() -> None:
    patience = used_to(0.1)
    for _ in range(LATE_ANSWERS):
        patience.note(16, 5.0, 0.2, late=True)
    patience.forget()
    assert not patience.is_slow
    assert patience.seconds(16, LEAST, MOST) == MOST

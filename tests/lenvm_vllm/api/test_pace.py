"""How much of a text may be sent while it grows."""

import itertools
from typing import Any

from lenvm_vllm.api.held_streams import HOLD, Pace
from lenvm_vllm.target.rails import landing_before
from lenvm_vllm.target.request import LengthTarget


def paced(target: Any, text: list[str], wall: int | None = None) -> list[int]:
    """Tokens that may be sent of each beginning of a text."""
    parsed = LengthTarget.parse(target)
    pace = Pace(landing_before(parsed, wall), parsed.unit)
    return [pace.free(at + 1, token) for at, token in enumerate(text)]


def test_a_text_slows_down_before_its_landing_and_never_stops() -> None:
    """The landing of 200 tokens opens at 190, so every other token is held from 158 on."""
    free = paced(200, ["a "] * 260)
    opens = 190
    assert free[: opens - 2 * HOLD] == list(range(1, opens - 2 * HOLD + 1))
    assert free[opens - 1 : 200] == [tokens - HOLD for tokens in range(opens, 201)]
    assert free[200 : 200 + HOLD] == [200 - HOLD] * HOLD  # other endings begin before the target
    assert free[200 + HOLD :] == [tokens - 2 * HOLD for tokens in range(201 + HOLD, 261)]
    steps = [later - now for now, later in itertools.pairwise(free[:200])]
    assert set(steps) == {0, 1}
    assert all(one + other for one, other in itertools.pairwise(steps))


def test_a_short_text_is_held_from_its_first_token_on() -> None:
    free = paced(12, ["a "] * 14)
    assert free[0] == 0
    assert free[11] == 0


def test_the_wall_of_a_request_is_one_of_its_stream() -> None:
    assert paced(200, ["a "] * 195, wall=195)[180] < paced(200, ["a "] * 195)[180]


def test_words_are_held_by_the_tokens_that_they_take() -> None:
    """Two tokens a word, so the landing of 100 words opens at token 190."""
    free = paced({"words": 100}, [" wo", "rd"] * 110)
    assert abs(free[189] - (190 - HOLD)) <= 2
    assert free[120:140] == list(range(121, 141))
    assert free == sorted(free)
    assert paced({"words": 100}, ["字"] * 110)[94] <= 95 - HOLD + 1
    letters = paced({"characters": 100}, ["ab"] * 60)
    assert abs(letters[47] - (48 - HOLD)) <= 2
    assert paced({"words": 100}, ["wo "] * 160)[159] == 160 - 2 * HOLD


def test_a_limit() -> None:
    """Its landing is the last fifth."""
    free = paced({"mode": "at_most", "tokens": 100}, ["a "] * 100)
    assert free[79:99] == [tokens - HOLD for tokens in range(80, 100)]

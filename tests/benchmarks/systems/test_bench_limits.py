"""What the benchmark of limits asks, and what it calls a limit that was passed."""

from collections import Counter

from benchmarks.systems.limits import PROMPTS, Answer, jobs, row_of


def test_every_script_has_every_kind_of_request() -> None:
    made = jobs(64, 20, 400)
    kinds = Counter(
        (script, body["stream"], body["length_target"]["mode"]) for script, body in made
    )
    assert len(kinds) == 4 * len(PROMPTS)
    assert set(kinds.values()) == {4}
    assert all(20 <= body["length_target"]["characters"] <= 400 for _, body in made)


def test_what_is_above_and_what_is_inexact() -> None:
    limit = {"characters": 3, "mode": "at_most"}
    exact = {"characters": 3, "mode": "equal_to", "tolerance": 0}
    answers = [
        Answer("Latin", wish, text, 0.5) for wish in (limit, exact) for text in ("ab", "abcd")
    ]
    row = row_of("Latin", answers)
    assert (row["n"], row["above"], row["inexact"]) == (4, 2, 2)
    (few,) = [a for a in answers if a.asked is exact and a.text == "ab"]
    assert row_of("Latin", [few])["of at_most used %"] is None

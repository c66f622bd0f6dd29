"""What the benchmark of faults counts, and with what it compares a fault."""

import pytest

from benchmarks.systems.fault_summary import Observed, Window, few, lines
from benchmarks.systems.latency import Latency, within
from benchmarks.systems.streams import Answer, Span, ends_whole


@pytest.mark.parametrize(
    ("text", "natural", "whole"),
    [
        ("It rained. We went home.", False, True),
        ("It rained. We went", False, False),
        ("It rained. We went", True, False),
        ("Buy:\n- apples\n- pears\n", False, True),
        ("Buy:\n- apples\n- pe", False, False),
        ("Buy:\n1. apples\n2. pears", True, True),
        ("Buy:\n- apples\n-", True, False),
        ("So:\n```\nx = 1\n```", False, True),
        ("So:\n```\nx = 1\n", False, False),
    ],
)
def test_what_ends_whole(text: str, natural: bool, whole: bool) -> None:
    assert ends_whole(text, natural) is whole


def _answer(length: int, valued: list[bool], ended: float, **wish: object) -> Answer:
    known = [(ended - 1, one) for one in valued]
    text = "It ends." if length % 2 == 0 else "It"
    return Answer(wish, False, ended, text, length, "stop", {"end": "whole"}, known)


def test_a_text_is_blind_if_most_of_its_landing_had_no_values() -> None:
    late = [*[True] * 50, *[False] * 10]
    assert _answer(60, late, 0.0, tokens=60).blind
    assert not _answer(60, late[::-1], 0.0, tokens=60).blind
    assert _answer(60, late, 0.0, tokens=60).choosy
    assert not _answer(60, late, 0.0, tokens=60, tolerance=0.0).choosy  # it has one place to end
    assert not Answer(None, text="It", reason="stop").choosy


def test_rails() -> None:
    assert _answer(66, [], 0.0, tokens=60).inside
    assert not _answer(67, [], 0.0, tokens=60).inside
    assert Answer({"tokens": 60}).inside  # lost, and counted as that


def _gaps(begin: float, count: int, seconds: float) -> list[Span]:
    return [(begin + i * seconds, begin + (i + 1) * seconds) for i in range(count)]


def test_gaps_count_where_they_touch_a_time_and_nothing_that_is_set_aside() -> None:
    gaps = _gaps(0, 10, 1.0)
    assert within(gaps, [(2.5, 4.5)], []) == [(2, 3), (3, 4), (4, 5)]
    assert within(gaps, [(2.5, 4.5)], [(4.2, 9)]) == [(2, 3), (3, 4)]
    assert Latency.of([]) is None
    assert Latency.of(gaps) == Latency(10, 1000.0, 1000.0, 1000.0)


def _observed() -> Observed:
    windows = [
        Window((0, 10), rows=100, valued=90),
        Window((10, 20), "late", rows=100, valued=20, recovery_s=0.5),
        Window((20, 30), rows=100, valued=90),
        Window((30, 40), only="long prompts", rows=10, valued=10),
        Window((40, 50), "long prompts", rows=10, valued=5, recovery_s=1.0),
        Window((50, 60), "vllm restarted", timed=False, recovery_s=2.0),
    ]
    lengths = (0.1, 0.2, 0.1, 0.4, 0.5, 5.0)
    gaps = [
        gap
        for window, seconds in zip(windows, lengths, strict=True)
        for gap in _gaps(window.span[0] + 0.01, int(9 / seconds), seconds)
    ]
    blind = [*[True] * 50, *[False] * 10]
    answers = [_answer(60, blind, 15, tokens=60), _answer(61, blind, 16, tokens=60), Answer(None)]
    return Observed(windows, answers, {True: gaps, False: gaps}, [])


def test_a_fault_is_compared_with_healthy_times() -> None:
    rows = {row["fault"]: row for row in _observed().rows()}
    assert rows["late"]["guided"]["p99_ratio"] == 2
    assert rows["long prompts"]["neighbour"]["p99_ratio"] == 1.25  # its own healthy time
    assert rows["vllm restarted"]["guided"] is None
    assert (rows["late"]["values"], rows["late"]["steered"]) == (0.2, round(50 / 60, 3))
    assert (rows["late"]["whole"], rows["late"]["whole_steered"]) == ((1, 2), (0, 0))
    assert "p99_ratio" not in rows["healthy"]["guided"]
    assert len(lines(list(rows.values()))) == len(rows)
    assert few(list(rows.values()), 30) == ["healthy, long prompts", "long prompts"]


def test_the_result_has_the_worst() -> None:
    result = _observed().result()
    assert result["guided_itl_p99_ratio_worst"] == result["neighbour_itl_p99_ratio_worst"] == 2
    assert (result["requests"], result["lost"], result["outside_rails"]) == (3, 1, 0)
    assert (result["faults"], result["steps_with_values"], result["whole"]) == (3, 0.9, 0.5)
    assert result["worst_gap_ratio"] == 2
    assert result["healthy_itl_p99_ms"] == [100.0, 100.0]

"""What the benchmark of the queue makes of several runs."""

import pytest

from benchmarks.systems.scheduling import ARMS, KINDS, figures, seconds


def run(fcfs: float, asked: float, forecast: float) -> dict[str, dict[str, float]]:
    known = zip(ARMS, (fcfs, asked, forecast), strict=True)
    return {arm: dict.fromkeys(KINDS, value) | {"tokens": 100} for arm, value in known}


def test_ratios_are_of_the_same_run() -> None:
    rows = {row["arm"]: row for row in figures([run(10, 11, 8), run(20, 22, 18)], 300)}
    assert [rows[arm]["mean ratio"].value for arm in ARMS] == pytest.approx([1, 1.1, 0.85])
    assert rows["asked"]["p99 ratio"].interval(3) == [1.1, 1.1]
    assert rows["forecast"]["mean s"].value == 13
    low, high = rows["forecast"]["mean ratio"].interval(3)
    assert (low, high) == (0.8, 0.9)
    assert (rows["forecast"]["runs"], rows["forecast"]["n"]) == (2, 600)
    assert rows["forecast"]["tokens"] == 200


def test_seconds_of_a_report() -> None:
    report = {"mean_e2el_ms": 1500.0, "median_e2el_ms": 1000.0, "p99_e2el_ms": 9000.0}
    assert seconds(report) == {"mean": 1.5, "median": 1.0, "p99": 9.0}

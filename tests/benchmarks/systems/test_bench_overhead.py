"""What the throughput with the plugin is compared with: rounds of warm servers alone."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.servers import Models
from benchmarks.systems import overhead


def test_the_round_that_finds_cold_servers_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    served = {"lenvm_rows_total": 0.0, "lenvm_valued_rows_total": 0.0}

    def bench(*given: Any) -> dict[str, Any]:
        asked.append(fields := given[3])
        served["lenvm_rows_total"] += 10 * ("length_target" in fields)
        served["lenvm_valued_rows_total"] += 5 * ("length_target" in fields)
        speed = {"output_throughput": float(len(asked)), "median_itl_ms": 1.0, "p99_itl_ms": 1.0}
        return speed | {"total_output_tokens": 4 * 16}

    monkeypatch.setattr(overhead, "bench", bench)
    monkeypatch.setattr(overhead, "metrics", lambda url: dict(served))
    monkeypatch.setattr(overhead, "awake", nullcontext)
    server: Any = SimpleNamespace(url="")
    rates = overhead.rates_of((server, server), Models(), 1, 16, 2, tmp_path)
    assert [rates[arm] for arm in overhead.arms(16)] == [[5, 9], [6, 10], [7, 11], [8, 12]]
    assert rates["valued guided"] == rates["valued tilt"] == [0.5, 0.5]

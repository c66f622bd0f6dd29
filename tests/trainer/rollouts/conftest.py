"""A vLLM made by hand, and logs that are imported with the tiny model."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support.fake_vllm import FakeVllm
from tests.support.logs import Import, write
from trainer.rollouts.import_logs import import_logs


@pytest.fixture
def imported(base: Path, tmp_path: Path) -> Import:
    """The rows that come of lines, each time in a folder of its own."""
    number = itertools.count()

    def run(*lines: Any, **options: Any) -> list[dict[str, Any]]:
        log, out = write(tmp_path / "log.jsonl", *lines), tmp_path / f"out-{next(number)}"
        import_logs(log, out, model=str(base), **options)
        rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
        return rows

    return run


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    fake = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return fake

"""Passes that fail: for want of memory, for one row, or whatever is in them; or that do not end."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.support.blocked import SECONDS, BlockedEngine, wait_until
from tests.support.slots import check_integrity
from tests.support.tiny import tiny_model
from tests.support.value_servers import expected
from tests.support.value_servers import job as step
from value_server.engine.batcher import Batcher
from value_server.engine.engine import Engine
from value_server.engine.errors import BusyError, ModelError
from value_server.engine.job import Job, Row


class Faulty(Engine):
    """An engine whose passes fail where `fault` says so, given their rows and tokens."""

    def __init__(self, fault: Callable[[Sequence[Row], int], bool], **options: int) -> None:
        super().__init__(tiny_model(max_position=1024), slots=4096, **options)
        self.fault = fault

    def _forward(self, rows: Sequence[Row], tokens: Any, written: Any) -> Any:
        if self.fault(rows, len(written)):
            raise RuntimeError("out of memory")
        return super()._forward(rows, tokens, written)


@contextlib.contextmanager
def faulty(fault: Callable[[Sequence[Row], int], bool]) -> Iterator[tuple[Faulty, Batcher]]:
    engine = Faulty(fault)
    batcher = Batcher(engine)
    batcher.start()
    yield engine, batcher
    batcher.stop()
    check_integrity(engine.cache)


def test_what_is_too_large_for_the_memory_goes_in_smaller_passes() -> None:
    with faulty(lambda _, queries: queries > 40) as (engine, batcher):
        text = [i % 200 for i in range(400)]
        result = batcher.submit(step("a", text)).result(SECONDS)
        np.testing.assert_allclose(result.logits, expected(text), atol=1e-4)
        assert engine.pace.failed > 0
        assert batcher.ready
        engine.fault = lambda *_: False
        for n in range(200):
            batcher.submit(step("a", [9], start=400 + n)).result(SECONDS)
        assert engine.pace.limits().tokens == 2048


def test_a_row_that_fails_alone_is_refused_alone() -> None:
    with faulty(lambda rows, _: any(row.name == "bad" for row in rows)) as (_, batcher):
        names = ("a", "bad", "b", "c")
        job = Job([Row(name, 0, [i] * 9, [1, 2]) for i, name in enumerate(names)])
        result = batcher.submit(job).result(SECONDS)
        assert {row: str(why) for row, why in result.refused.items()} == {
            1: "the forward pass failed: out of memory"
        }
        z = result.logits.reshape(4, 2)
        for row in (0, 2, 3):
            np.testing.assert_allclose(z[row], expected([row] * 9), atol=1e-4)
        with pytest.raises(ModelError, match="the forward pass failed"):
            batcher.submit(Job([Row("bad", 0, [4])], texts=True)).result(SECONDS)
        assert batcher.ready


def test_passes_that_fail_whatever_they_are_end_the_service() -> None:
    with faulty(lambda *_: True) as (_, batcher):
        late = batcher.submit(step("a", [3] * 200)), batcher.submit(step("b", [4]))
        for future in late:
            with pytest.raises(BusyError):
                future.result(SECONDS)
        wait_until(lambda: not batcher.works)
        assert not batcher.ready
        with pytest.raises(BusyError):
            batcher.submit(step("c", [1]))


def test_a_pass_that_does_not_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("value_server.engine.batcher.STUCK_S", 0.0)
    engine = BlockedEngine()
    batcher = Batcher(engine)
    batcher.start()
    assert batcher.works
    batcher.submit(step("a", [1]))
    engine.wait_for_pass()
    wait_until(lambda: not batcher.works)
    assert not batcher.ready
    engine.allow()
    batcher.stop()

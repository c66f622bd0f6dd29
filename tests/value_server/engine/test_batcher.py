"""The batcher: callers who leave, a queue that is full, and what a job is told of its times."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.support.blocked import SECONDS, BlockedEngine, wait_until
from tests.support.slots import check_integrity
from tests.support.value_servers import naive
from value_server.engine.batcher import Batcher
from value_server.engine.errors import BusyError, ModelError, RequestError
from value_server.engine.job import Job, JobResult, Row


@pytest.fixture
def engine() -> BlockedEngine:
    return BlockedEngine(prefill_tokens=64)


@pytest.fixture
def batcher(engine: BlockedEngine) -> Iterator[Batcher]:
    batcher = Batcher(engine, max_waiting=8)
    batcher.start()
    yield batcher
    engine.allow()
    batcher.stop()
    check_integrity(engine.cache)


def step(name: str, tokens: list[int], start: int = 0) -> Job:
    return Job([Row(name, start, tokens, [1, 2])])


def expected(text: list[int]) -> list[torch.Tensor]:
    return [naive([*text, c], max_position=1024)[-1] for c in (1, 2)]


def test_caller_who_leaves_while_waiting_is_not_computed(
    engine: BlockedEngine, batcher: Batcher
) -> None:
    first = batcher.submit(step("a", [1]))
    engine.wait_for_pass()
    gone = batcher.submit(step("b", [5] * 20))
    last = batcher.submit(step("c", [6]))
    assert gone.cancel()
    engine.allow()
    first.result(SECONDS)
    last.result(SECONDS)
    assert set(engine.cache.sessions) == {"a", "c"}
    assert engine.forwarded == 6
    again = batcher.submit(step("b", [5] * 20)).result(SECONDS)
    np.testing.assert_allclose(again.logits, expected([5] * 20), atol=1e-4)
    assert batcher.depth == 0


def test_caller_who_leaves_during_a_prefill_stops_it_after_its_pass(
    engine: BlockedEngine, batcher: Batcher
) -> None:
    text = [i % 200 for i in range(400)]
    gone = batcher.submit(step("a", text))
    engine.wait_for_pass()
    engine.allow(1)
    engine.wait_for_pass()
    assert gone.cancel()
    engine.allow(1)
    other = batcher.submit(step("b", [7]))  # behind the drop: the engine has seen it by then
    engine.allow()
    other.result(SECONDS)
    assert engine.forwarded == 2 * 64 + 3
    assert not engine.cache.sessions["a"].pinned
    # What was computed of the session is used by its next request.
    again = batcher.submit(step("a", text)).result(SECONDS)
    np.testing.assert_allclose(again.logits, expected(text), atol=1e-4)
    assert engine.forwarded == 400 + 2 + 3


def test_one_of_two_samples_leaves_and_the_other_goes_on(
    engine: BlockedEngine, batcher: Batcher
) -> None:
    """The pass takes shared slots from one row only; the other must take them over."""
    text = [i % 200 for i in range(400)]
    gone, stays = batcher.submit(step("a", text)), batcher.submit(step("b", text))
    engine.wait_for_pass()
    engine.allow(2)
    engine.wait_for_pass()
    engine.wait_for_pass()
    assert gone.cancel()
    engine.allow()
    np.testing.assert_allclose(stays.result(SECONDS).logits, expected(text), atol=1e-4)
    assert engine.forwarded == 402


def test_queue_never_holds_more_than_it_may(engine: BlockedEngine, batcher: Batcher) -> None:
    """64 callers at the same instant for 8 places: steps are answered without values, texts told
    that it is full."""
    begin = threading.Barrier(64)
    deepest = 0

    def call(number: int) -> "Future[JobResult] | BusyError":
        nonlocal deepest
        begin.wait()
        job = step(f"s{number}", [3, 4])
        try:
            return batcher.submit(Job([Row("", 0, [3])], texts=True) if number % 2 else job)
        except BusyError as error:
            return error
        finally:
            deepest = max(deepest, batcher.depth)

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(call, range(64)))
    assert deepest == 8
    waiting = [a for a in answers if isinstance(a, Future) and not a.done()]
    told = [a.result(0) for a in answers if isinstance(a, Future) and a.done()]
    assert len(waiting) == 8
    assert len([a for a in answers if isinstance(a, BusyError)]) + len(told) == 56
    for result in told:
        assert np.isnan(result.logits).all()
        assert result.held == [0]
    engine.allow()
    for future in waiting:
        future.result(SECONDS)
    assert np.isfinite(batcher.submit(step("again", [3])).result(SECONDS).logits).all()
    assert batcher.depth == 0


def test_who_is_gone_takes_no_place(engine: BlockedEngine, batcher: Batcher) -> None:
    futures = [batcher.submit(step(f"s{i}", [3])) for i in range(8)]
    assert batcher.submit(step("more", [3])).result(0).pending == 1
    for future in futures:
        future.cancel()
    engine.allow()
    wait_until(lambda: batcher.depth == 0)
    assert batcher.submit(step("more", [3])).result(SECONDS).pending == 0


def test_times_tell_prefill_from_compute(engine: BlockedEngine, batcher: Batcher) -> None:
    engine.allow()
    long, short = step("a", [9] * 200), step("b", [9])
    batcher.submit(long).result(SECONDS)
    batcher.submit(short).result(SECONDS)
    assert engine.passes == 5  # 64 + 64 + 64 + (8 and the candidates), and the short one
    assert long.prefill_seconds > 0
    assert long.compute_seconds > 0
    assert long.queue_seconds > 0
    assert short.prefill_seconds == 0
    assert short.compute_seconds > 0


def test_nothing_is_left_hanging_at_a_stop(engine: BlockedEngine) -> None:
    batcher = Batcher(engine)
    batcher.start()
    futures = [batcher.submit(step("a", [1] * 400)), batcher.submit(step("a", [2]))]
    engine.wait_for_pass()
    stop = threading.Thread(target=batcher.stop)
    stop.start()
    wait_until(lambda: not batcher._inbox.empty() and batcher.draining)
    engine.allow()
    stop.join(SECONDS)
    for future in futures:
        with pytest.raises(BusyError, match="shutting down"):
            future.result(0)
    with pytest.raises(BusyError, match="shutting down"):
        batcher.submit(step("b", [1]))


def test_error_in_an_admission_fails_its_job_only(engine: BlockedEngine, batcher: Batcher) -> None:
    update = engine.cache.update

    def failing(name: str, *rest: object, **more: object) -> object:
        if name == "bad":
            raise RuntimeError("a bug")
        return update(name, *rest, **more)  # type: ignore[arg-type]

    engine.cache.update = failing  # type: ignore[assignment, method-assign]
    engine.allow()
    futures = [batcher.submit(step(name, [1])) for name in ("good", "bad", "better")]
    with pytest.raises(ModelError, match="internal error"):
        futures[1].result(SECONDS)
    for future in (futures[0], futures[2]):
        assert np.isfinite(future.result(SECONDS).logits).all()
    assert batcher.depth == 0


def test_what_can_never_be_served_takes_no_place(batcher: Batcher) -> None:
    with pytest.raises(RequestError, match="1025 tokens"):
        batcher.submit(Job([Row("a", 0, [1] * 1025)], texts=True))
    assert batcher.depth == 0

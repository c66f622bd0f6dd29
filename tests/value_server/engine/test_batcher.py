"""The batcher: callers who leave or wait no longer, a queue that is full, two engines at once."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from tests.support.blocked import SECONDS, BlockedEngine, wait_until
from tests.support.slots import check_integrity
from tests.support.value_servers import expected
from tests.support.value_servers import job as step
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


def test_sessions_are_closed_where_the_queue_is_full(
    engine: BlockedEngine, batcher: Batcher
) -> None:
    """By themselves, and beside a step that has no place: nobody would close them later."""
    engine.allow(1)
    batcher.submit(Job([Row(name, 0, [3]) for name in "ab"])).result(SECONDS)
    futures = [batcher.submit(step(f"s{i}", [3])) for i in range(8)]
    futures.append(batcher.submit(Job([], ["a", "unknown"])))
    assert batcher.submit(Job([Row("more", 0, [3], [1])], ["b"])).result(0).pending == 1
    engine.allow()
    for future in futures:
        future.result(SECONDS)
    wait_until(lambda: batcher.depth == 0)
    assert engine.cache.sessions.keys() == {f"s{i}" for i in range(8)}


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


def told(name: str, tokens: list[int], start: int = 0) -> Job:
    """A message that waits for nothing."""
    return Job([Row(name, start, tokens)], budget=0.0, left=True)


def test_who_waits_for_nothing_is_answered_before_any_pass(
    engine: BlockedEngine, batcher: Batcher
) -> None:
    result = batcher.submit(told("a", [i % 200 for i in range(100)])).result(SECONDS)
    assert (result.held, engine.passes) == ([100], 0)
    engine.allow()
    wait_until(lambda: engine.forwarded == 100)
    wait_until(lambda: batcher.depth == 0)
    text = [i % 200 for i in range(100)]
    again = batcher.submit(Job([Row("a", 100, [], [1, 2])])).result(SECONDS)
    np.testing.assert_allclose(again.logits, expected(text), atol=1e-4)
    assert engine.forwarded == 102


def test_a_job_that_is_left_has_what_is_there_and_is_computed_on(
    engine: BlockedEngine, batcher: Batcher
) -> None:
    """Rows are answered one by one; candidates that come too late are not computed."""
    text = [i % 200 for i in range(200)]
    job = Job([Row("long", 0, text, [1, 2]), Row("short", 0, [7], [1, 2])])
    batcher.submit(job)
    engine.wait_for_pass()
    engine.allow(1)
    engine.wait_for_pass()
    answer = batcher.leave(job)
    assert answer.held == [200, 1]
    assert np.isnan(answer.logits[:2]).all()
    np.testing.assert_allclose(answer.logits[2:], expected([7]), atol=1e-4)
    engine.allow()
    wait_until(lambda: batcher.depth == 0)
    assert engine.forwarded == 203
    again = batcher.submit(Job([Row("long", 200, [], [1, 2])])).result(SECONDS)
    np.testing.assert_allclose(again.logits, expected(text), atol=1e-4)
    assert engine.forwarded == 205


def test_a_newer_message_does_not_wait_for_one_that_is_left(
    engine: BlockedEngine, batcher: Batcher
) -> None:
    text = [i % 200 for i in range(400)]
    batcher.submit(told("a", text)).result(SECONDS)
    engine.wait_for_pass()
    newer = batcher.submit(Job([Row("a", 100, [5], [1, 2])]))  # another text, from there
    engine.allow()
    np.testing.assert_allclose(newer.result(SECONDS).logits, expected([*text[:100], 5]), atol=1e-4)
    assert engine.forwarded == 103
    assert not engine.cache.sessions["a"].pinned


def test_rows_without_room_are_answered_at_once(engine: BlockedEngine, batcher: Batcher) -> None:
    engine.allow()
    batcher.submit(step("large", [3] * 1000)).result(SECONDS)
    batcher.submit(step("other", [4] * 1000)).result(SECONDS)
    for name in ("b", "c"):
        batcher.submit(step(name, [ord(name)] * 1000)).result(SECONDS)
    passes = engine.passes
    job = Job([Row("late", 0, [9] * 200, [1, 2]), Row("b", 1000, [1], [1, 2])])
    result = batcher.submit(job).result(SECONDS)
    assert (result.held, result.pending) == ([0, 1001], 1)
    assert np.isfinite(result.logits[2:]).all()
    assert engine.passes == passes + 1
    with pytest.raises(BusyError, match="in use"):
        batcher.submit(Job([Row("text", 0, [9] * 200)], texts=True)).result(SECONDS)


@pytest.mark.parametrize("limit", [{"max_sessions": 8}, {"slots": 270}])
def test_two_engines_with_twice_the_sessions_do_not_evict_each_other(limit: dict[str, int]) -> None:
    """Those who came first have values in every step; nothing is computed twice."""
    engine = BlockedEngine(**limit)
    engine.allow(10_000)
    batcher = Batcher(engine)
    batcher.start()
    names = [f"{client}{n}" for client in "ab" for n in range(8)]
    held, with_values = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for length in range(10, 30):
        for client in "ab":
            own = [name for name in names if name[0] == client]
            texts = {name: [names.index(name)] + [5] * (length - 1) for name in own}
            rows = [Row(name, held[name], texts[name][held[name] :], [1, 2, 5]) for name in own]
            result = batcher.submit(Job(rows, client=client)).result(SECONDS)
            held.update(zip(own, result.held, strict=True))
            for name, z in zip(own, result.logits.reshape(-1, 3), strict=True):
                with_values[name] += bool(np.isfinite(z).all())
    batcher.stop()
    assert all(with_values[name] == 20 for name in names[:8])
    assert engine.cache.evictions == 0
    assert engine.cache.preemptions <= 8  # each of the others once at most
    fresh = sum(10 + 3 * steps for steps in with_values.values() if steps)
    assert engine.forwarded == fresh
    check_integrity(engine.cache)

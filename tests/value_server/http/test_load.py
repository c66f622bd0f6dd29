"""Clients who leave and clients who are too many, over a real socket, with an engine that waits."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from tests.support.blocked import SECONDS, BlockedEngine, wait_until
from tests.support.slots import check_integrity
from tests.support.value_servers import as_client, asking, in_thread, naive, step, step_body
from value_server.contract import wire
from value_server.http import routes
from value_server.http.app import create_app
from value_server.http.models import ServedModel
from value_server.http.text import Texts


@dataclass(frozen=True)
class Served:
    model: ServedModel
    engine: BlockedEngine
    url: str
    client: httpx.Client

    def figure(self, line: str) -> float:
        """A number of /metrics, 0 if it is not there yet."""
        for found in self.client.get("/metrics").text.splitlines():
            if found.startswith(line + " "):
                return float(found.split()[-1])
        return 0.0

    def leave(self, path: str, in_pass: bool = False, **body: Any) -> None:
        """Send a request, close the connection once it is in the queue, or in a pass, and wait till
        that is noticed."""
        left, batcher = 'lenvm_errors_total{type="client_gone"}', self.model.batcher
        before, depth = self.figure(left), batcher.depth
        request = httpx.Request("POST", self.url, **body)
        kind = request.headers.get("Content-Type", wire.MEDIA_TYPE)
        with asking(self.url, path, request.content, **{"Content-Type": kind}):
            wait_until(lambda: batcher.depth == depth + 1)
            if in_pass:
                self.engine.wait_for_pass()
        wait_until(lambda: self.figure(left) == before + 1)


@pytest.fixture
def served() -> Iterator[Served]:
    engine = BlockedEngine(prefill_tokens=64)
    app = create_app({"": (model := ServedModel.of(engine, Texts(None), max_waiting=8))})
    with (
        in_thread(uvicorn.Server(uvicorn.Config(app, log_level="warning"))) as (url, _),
        as_client(url) as client,
    ):
        try:
            yield Served(model, engine, url, client)
        finally:
            engine.allow()
    check_integrity(engine.cache)


def body(name: str, tokens: list[int]) -> bytes:
    return step_body((name, 0, tokens, [1, 2]))


def check_step(served: Served, name: str, tokens: list[int]) -> None:
    got = wire.unpack_logits(step(served.client, (name, 0, tokens, [1, 2])).logits)
    expected = [naive([*tokens, c], max_position=1024)[-1] for c in (1, 2)]
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("path", [wire.STEP_PATH, wire.PREDICT_PATH, wire.VALUES_PATH])
def test_client_who_leaves_stops_its_prefill(served: Served, path: str) -> None:
    text = [i % 200 for i in range(400)]
    if path == wire.STEP_PATH:
        served.leave(path, in_pass=True, content=body("a", text))
    else:
        served.leave(path, in_pass=True, json={"token_ids": text})
    served.engine.allow()  # the pass that had begun
    check_step(served, "b", [7])
    assert served.engine.forwarded == 64 + 3
    assert served.engine.passes == 2
    sessions = served.engine.cache.sessions
    assert not any(session.pinned for session in sessions.values())
    check_step(served, "a", text)


def test_client_who_leaves_the_queue_is_never_computed(served: Served) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(check_step, served, "a", [1])
        served.engine.wait_for_pass()
        served.leave(wire.STEP_PATH, content=body("b", [5] * 20))
        served.leave(wire.PREDICT_PATH, json={"token_ids": [5] * 20})
        served.engine.allow()
        first.result(SECONDS)
    check_step(served, "c", [6])
    assert served.engine.forwarded == 6
    assert set(served.engine.cache.sessions) == {"127.0.0.1 a", "127.0.0.1 c"}
    check_step(served, "b", [5] * 20)


def test_who_finds_the_queue_full_is_told_at_once(served: Served) -> None:
    """40 steps and 20 texts for 8 places: 52 answers come before the engine does anything at all;
    steps have no values, texts a 503."""

    def post(number: int) -> tuple[httpx.Response, float]:
        if number % 3:
            fields: dict[str, Any] = {"content": body(f"s{number}", [number])}
        else:
            fields = {"json": {"token_ids": [number]}}
        path = wire.STEP_PATH if number % 3 else wire.PREDICT_PATH
        return served.client.post(path, **fields), time.monotonic()

    with ThreadPoolExecutor(60) as pool:
        futures = [pool.submit(post, number) for number in range(60)]
        wait_until(lambda: sum(future.done() for future in futures) == 52)
        assert served.client.get("/ready").status_code == 200
        opened = time.monotonic()
        served.engine.allow()
        answers = [future.result(SECONDS) for future in futures]
    early = [reply for reply, at in answers if at < opened]
    assert len(early) == 52
    busy = [reply for reply, _ in answers if reply.status_code == 503]
    for reply in busy:
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["type"] == "busy"
        assert reply in early
    pending = 0
    for number, (reply, _) in enumerate(answers):
        if reply.status_code != 503 and number % 3:
            told = wire.decode_reply(reply.content, wire.decode_request(body("", [number])))
            assert np.isfinite(wire.unpack_logits(told.logits)).all() == (told.held == [1])
            pending += told.held == [0]
    assert pending + len(busy) == 52
    assert served.figure('lenvm_errors_total{type="busy"}') == len(busy)
    assert served.figure("lenvm_rows_pending_total") == pending
    check_step(served, "later", [3])


def test_a_step_waits_no_longer_than_its_budget(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a pass runs, steps are answered without values; those of later steps are there. A long
    text has its own once it is computed, and the other row does not wait for it."""
    monkeypatch.setattr(routes, "UNTAKEN_S", SECONDS)  # else a busy machine may not take the first
    ask = partial(step, served.client)
    text = [i % 200 for i in range(200)]
    assert ask(("a", 0, text, []), budget_ms=0.0).held == [200]
    served.engine.wait_for_pass()
    late = ask(("b", 0, [7], [1, 2]), budget_ms=30.0)  # the pass does not even end
    assert late.held == [0]
    assert np.isnan(wire.unpack_logits(late.logits)).all()
    assert served.figure("lenvm_queue_seconds_sum") > 0.02
    served.engine.allow()
    expected = [naive([*t, c], max_position=1024)[-1] for t in ([7], text) for c in (1, 2)]
    z, asked = np.array([np.nan]), 0
    while np.isnan(z).any():
        asked += 1
        again = ask(("b", 0, [7], [1, 2]), ("a", 200, [], [1, 2]), budget_ms=1000 * SECONDS)
        assert again.held == [1, 200]
        z = wire.unpack_logits(again.logits)
        np.testing.assert_allclose(z[:2], expected[:2], atol=1e-4)
    np.testing.assert_allclose(z, expected, atol=1e-4)
    assert served.figure("lenvm_rows_pending_total") == asked  # with that of the first step
    assert served.engine.forwarded == 200 + 1 + 4


def test_a_message_that_waits_for_no_values_is_answered_though_nothing_is_taken(
    served: Served,
) -> None:
    """Else its client would think that the server is lost, behind a long pass; this one ends only
    after that."""
    ask, text = partial(step, served.client), [i % 200 for i in range(100)]
    ask(("a", 0, [1, 2, 3], []), budget_ms=0.0)
    served.engine.wait_for_pass()
    assert ask(("b", 0, text, []), budget_ms=0.0).held == [0]
    served.engine.allow()
    wait_until(lambda: served.engine.forwarded == 3 + 100)  # it is computed all the same
    assert ask(("b", 100, [], [1]), budget_ms=1000 * SECONDS).held == [100]


def test_metrics_tell_of_rows(served: Served) -> None:
    served.engine.allow()
    rows = [("good", 0, [1], [2]), ("long", 0, [1] * 2000, [2]), ("lost", 7, [1], [2, 3])]
    step(served.client, *rows)
    for n in range(4):
        step(served.client, (f"large {n}", 0, [n] * 1020, [2]))
    assert served.figure('lenvm_rows_refused_total{type="invalid_request"}') == 1
    assert served.figure("lenvm_rows_pending_total") == 2
    assert served.figure("lenvm_sessions_waiting") == 1
    assert served.figure("lenvm_sessions_idle") == 0
    assert served.figure("lenvm_preemptions_total") == 0
    assert served.figure("lenvm_pass_failures_total") == 0


def test_metrics_split_a_step(served: Served) -> None:
    served.engine.allow()
    check_step(served, "a", [9] * 200)
    check_step(served, "b", [9] * 200)
    for part in ("step", "encode", "queue", "prefill", "compute"):
        assert served.figure(f"lenvm_{part}_seconds_count") == 2
    parts = [f"lenvm_{p}_seconds_sum" for p in ("encode", "queue", "prefill", "compute")]
    assert 0 < sum(map(served.figure, parts)) <= served.figure("lenvm_step_seconds_sum")
    assert served.figure("lenvm_prefill_seconds_sum") > 0
    assert served.figure("lenvm_prefix_tokens_total") == 400
    assert served.figure("lenvm_prefix_hits_total") == 200
    assert served.figure("lenvm_tokens_forwarded_total") == 202
    assert served.figure("lenvm_tokens_saved_total") == 202
    assert served.figure("lenvm_evictions_total") == 0
    assert served.figure("lenvm_sessions") == 2
    assert served.figure("lenvm_slots_used") == 202

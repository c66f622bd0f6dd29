"""Several value servers as one: whose a session is, and who notices when one is lost."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from lenvm_vllm.values.client import CircuitOpen, Mismatch, TimedOut, Unreachable
from lenvm_vllm.values.patience import FEW
from lenvm_vllm.values.replicas import Replicas, rank
from tests.support.fakes import INFO
from value_server.contract import wire
from value_server.contract.values import length_from_logit, logit_from_length

SECONDS = 120.0  # longer than anything here takes
URLS = ("http://a", "http://b", "http://c")


class Server:
    """Holds texts as a value server does; candidate x is x tokens from the end.

    error: what it raises instead, as long as it is set; step_error: in steps alone.
    """

    def __init__(self, **info: Any) -> None:
        self.info = msgspec.structs.replace(INFO, **info)
        self.error: Exception | None = None
        self.step_error: Exception | None = None
        self.rests = False
        self.held: dict[str, int] = {}
        self.steps: list[wire.StepRequest] = []
        self.searched = threading.Event()

    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
        self.searched.set()
        return self._or_fail(self.info)

    def step(self, request: wire.StepRequest) -> wire.StepReply:
        self._or_fail(None)
        if self.step_error is not None:
            raise self.step_error
        request = wire.decode_request(wire.encode(request))
        self.steps.append(request)
        for session in request.closed:
            self.held.pop(session, None)
        columns = zip(request.sessions, request.starts, request.token_counts, strict=True)
        lost = []
        for row, (session, start, count) in enumerate(columns):
            if start > self.held.get(session, 0):
                lost.append(row)
            else:
                self.held[session] = start + count
        lengths = torch.from_numpy(wire.unpack_ids(request.candidates).astype(np.float64))
        z = logit_from_length(lengths, self.info.gamma).float().numpy()
        z[np.isin(np.repeat(np.arange(len(request.sessions)), request.candidate_counts), lost)] = (
            np.nan
        )
        held = [self.held.get(session, 0) for session in request.sessions]
        return wire.StepReply(logits=wire.pack_logits(z), held=held)

    def _or_fail(self, answer: Any) -> Any:
        if self.error is not None:
            raise self.error
        return answer


def ours() -> str:
    return "ours"


def soon() -> float:
    return time.perf_counter() + SECONDS


def three() -> tuple[Replicas, dict[str, Server]]:
    servers = {url: Server() for url in URLS}
    replicas = Replicas(servers)
    while len(replicas.live) < len(servers):
        replicas.model(ours, soon())
    return replicas, servers


def ask(
    replicas: Replicas, names: list[str], start: int = 0, gamma: float = INFO.gamma
) -> dict[str, list[float]]:
    """Each session brings two tokens, and row i asks for i + 1 candidates. The lengths of those
    whose text is there."""
    counts = [row + 1 for row in range(len(names))]

    def build(rows: list[int], closed: list[str], seconds: float, rank: int) -> wire.StepRequest:
        return wire.StepRequest(
            sessions=[names[row] for row in rows],
            starts=[start] * len(rows),
            token_counts=[2] * len(rows),
            tokens=wire.pack_ids([5, 6] * len(rows)),
            candidate_counts=[counts[row] for row in rows],
            candidates=wire.pack_ids([c for row in rows for c in candidates_of(row)]),
            closed=closed,
        )

    told = {}
    for call in replicas.send(names, counts, build, SECONDS, SECONDS):
        assert call.is_there(soon())
        if (reply := replicas.read(call)) is None:
            continue
        z = torch.from_numpy(wire.unpack_logits(reply.logits).astype(np.float64))
        lengths = iter(length_from_logit(z, gamma).tolist())
        for row, held in zip(call.rows, reply.held, strict=True):
            mine = [next(lengths) for _ in candidates_of(row)]
            if held == start + 2:
                told[names[row]] = mine
    return told


def candidates_of(row: int) -> list[int]:
    """Of each row others."""
    return [(row * row + place) % 300 + 1 for place in range(row + 1)]


def check(told: dict[str, list[float]], names: list[str]) -> None:
    """Each has the values of its own candidates."""
    assert sorted(told) == sorted(names)
    for row, name in enumerate(names):
        np.testing.assert_allclose(told[name], candidates_of(row), rtol=1e-3)


def names_of(count: int) -> list[str]:
    return [f"s{i}" for i in range(count)]


def test_each_session_has_one_replica_and_gets_its_own_answer() -> None:
    replicas, servers = three()
    names = names_of(60)
    check(ask(replicas, names), names)
    assert sorted(n for server in servers.values() for n in server.held) == sorted(names)
    assert all(len(server.held) > 8 for server in servers.values())  # 20 expected, deviation 3.7
    for name in names:
        (url,) = (url for url, server in servers.items() if name in server.held)
        assert url == max(URLS, key=lambda url: rank(url, name))
    before = {url: set(server.held) for url, server in servers.items()}
    check(ask(replicas, names, start=2), names)
    assert {url: set(server.held) for url, server in servers.items()} == before


def test_a_lost_replica_moves_its_own_sessions_only() -> None:
    replicas, servers = three()
    names = names_of(60)
    ask(replicas, names)
    before = {url: set(server.held) for url, server in servers.items()}
    servers["http://b"].error = Unreachable("gone")
    told = ask(replicas, names, start=2)
    lost = [name for name in names if name not in told]
    assert set(lost) == before["http://b"]
    assert replicas.live == ["http://a", "http://c"]
    check(ask(replicas, lost), lost)
    for url in ("http://a", "http://c"):
        assert before[url] < set(servers[url].held)


def test_one_that_comes_back_gets_new_sessions_only() -> None:
    replicas, servers = three()
    lost, names = servers["http://b"], names_of(60)
    lost.error = Unreachable("gone")
    ask(replicas, names)
    ask(replicas, names)
    lost.error, lost.steps = None, []
    lost.searched.clear()
    replicas.model(ours)  # begins to look
    assert lost.searched.wait(SECONDS)
    while not any(lost.steps):
        replicas.model(ours)
        ask(replicas, [f"new{len(lost.steps)}{i}" for i in range(20)])
    assert not set(lost.held) & set(names)
    check(ask(replicas, names, start=2), names)


def test_one_that_is_found_and_answers_no_step_fills_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "vllm.lenvm")
    server = Server()
    replicas = Replicas({"http://a": server})

    def ask_when_found() -> None:
        while not replicas.live:
            with contextlib.suppress(CircuitOpen):
                replicas.model(ours, soon())
        ask(replicas, ["s"])

    for outage in range(1, 3):
        for _ in range(3):
            server.step_error = Unreachable("out of memory")
            ask_when_found()
        server.step_error = None
        ask_when_found()
        assert len(caplog.messages) == 2 * outage
    assert caplog.messages[:2] == [
        "value server http://a: Unreachable: out of memory",
        "value server http://a is back",
    ]


def test_a_search_keeps_no_step_waiting() -> None:
    release = threading.Event()

    class Hanging(Server):
        def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
            if self.held:  # the second time
                assert release.wait(SECONDS)
            return super().model(fingerprint)

    servers = {"http://a": Server(), "http://b": Hanging()}
    replicas = Replicas(servers)
    replicas.model(ours, soon())
    names = names_of(20)
    ask(replicas, names)
    servers["http://b"].error = TimedOut("slow")
    assert len(ask(replicas, names, start=2)) < 20
    mine = [name for name in names if name in servers["http://a"].held]
    for _ in range(3):
        replicas.model(ours)
        check(ask(replicas, mine, start=2), mine)
    release.set()


def wait_in_vain(replicas: Replicas) -> None:
    """A step that waits a little for searches; one that is held up before it waits is none."""
    before = replicas._awaited
    while replicas._awaited is before:
        with pytest.raises(CircuitOpen):
            replicas.model(ours, time.perf_counter() + 0.2)


def test_where_nobody_lives_a_search_is_waited_for_once() -> None:
    release = threading.Event()

    class Hanging(Server):
        def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
            assert release.wait(SECONDS)
            return super().model(fingerprint)

    replicas = Replicas({"http://a": Hanging()})
    wait_in_vain(replicas)
    with pytest.raises(CircuitOpen):
        replicas.model(ours, time.perf_counter() + 1e6)  # would not come back
    release.set()
    while not replicas.live:
        with contextlib.suppress(CircuitOpen):
            replicas.model(ours)


def test_of_several_searches_that_hang_each_is_waited_for_once() -> None:
    """Also where they begin one after the other: steps waited for the two by turns."""
    release = threading.Event()

    class Hanging(Server):
        def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
            assert release.wait(SECONDS)
            return super().model(fingerprint)

    servers = {"http://a": Hanging(), "http://b": Hanging()}
    replicas = Replicas(servers)
    for late in (True, False):
        servers["http://b"].rests = late
        wait_in_vain(replicas)
    with pytest.raises(CircuitOpen):
        replicas.model(ours, time.perf_counter() + 1e6)  # would not come back
    release.set()


def test_all_are_asked_at_the_same_time() -> None:
    """Each answers only once both have been asked: one after the other would wait for ever."""
    both = threading.Barrier(2)

    class Meeting(Server):
        def step(self, request: wire.StepRequest) -> wire.StepReply:
            both.wait(SECONDS)
            return super().step(request)

    replicas = Replicas({"http://a": Meeting(), "http://b": Meeting()})
    replicas.model(ours, soon())
    names = names_of(20)
    check(ask(replicas, names), names)


def test_the_end_of_a_session_is_told_where_it_is() -> None:
    replicas, servers = three()
    names = names_of(30)
    ask(replicas, names)
    assert not replicas.has_closed
    for name in [*names, "never-seen"]:
        replicas.close(name)
    assert replicas.has_closed
    ask(replicas, ["new"])
    assert not replicas.has_closed
    assert [name for server in servers.values() for name in server.held] == ["new"]
    told = [name for server in servers.values() for step in server.steps for name in step.closed]
    assert sorted(told) == sorted(names)


def test_nobody_answers() -> None:
    replicas, servers = three()
    for server in servers.values():
        server.error = Unreachable("gone")
    assert ask(replicas, names_of(20)) == {}
    with pytest.raises(Unreachable):
        ask(replicas, names_of(20))
    for server in servers.values():
        server.rests = True
    for _ in range(2):  # whoever asks first does not take the reason away
        with pytest.raises(Unreachable):
            replicas.model(ours, soon())


def test_the_first_contact_tells_why_nobody_answers() -> None:
    server = Server()
    server.error = Mismatch("tokenizer_fingerprint: another")
    with pytest.raises(Mismatch, match="another"):
        Replicas({"http://a": server}).model(ours, soon())


def test_limits_are_those_that_all_keep() -> None:
    a, b = Server(max_sessions=7, max_position=50), Server(max_candidates=9, max_position=80)
    info = Replicas({"http://a": a, "http://b": b}).model(ours, soon())
    assert (info.max_sessions, info.max_candidates, info.max_position) == (7, 9, 50)


def test_replicas_of_different_gamma_tell_the_same_lengths() -> None:
    servers = {"http://a": Server(), "http://b": Server(gamma=0.999)}
    replicas = Replicas(servers)
    gamma = replicas.model(ours, soon()).gamma
    names = names_of(30)
    check(ask(replicas, names, gamma=gamma), names)
    assert all(server.held for server in servers.values())


def test_answers_without_any_values_tell_nothing_of_how_long_values_take() -> None:
    """Where no text has room they come at once. Steps then waited so shortly that hundreds went
    without values when there was room again."""
    replicas = Replicas({"http://a": Server()})
    replicas.model(ours, soon())
    patience = replicas._replicas[0].patience
    for _ in range(2 * FEW):
        assert ask(replicas, ["s"], start=9) == {}  # more than the server holds
    assert patience.seconds(1, 0.0, SECONDS) == SECONDS
    for start in range(0, 4 * FEW, 2):
        check(ask(replicas, ["s"], start), ["s"])
    assert patience.seconds(1, 0.0, SECONDS) < SECONDS

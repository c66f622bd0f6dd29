"""The search for value servers that are lost: who waits for it, and what the log says."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

import pytest

from lenvm_vllm.values.client import CircuitOpen, Mismatch, TimedOut, Unreachable
from lenvm_vllm.values.replicas import Replicas
from tests.support.replicated import SECONDS, Server, ask, check, names_of, ours, soon, three
from value_server.contract import wire


class Hanging(Server):
    """Tells its model once it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
        assert self.release.wait(SECONDS)
        return super().model(fingerprint)


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
    lost = Hanging()
    lost.release.set()
    servers = {"http://a": Server(), "http://b": lost}
    replicas = Replicas(servers)
    replicas.model(ours, soon())
    names = names_of(20)
    ask(replicas, names)
    lost.error = TimedOut("slow")
    lost.release.clear()
    assert len(ask(replicas, names, start=2)) < 20
    mine = [name for name in names if name in servers["http://a"].held]
    for _ in range(3):
        replicas.model(ours)
        check(ask(replicas, mine, start=2), mine)
    lost.release.set()


def wait_in_vain(replicas: Replicas) -> None:
    """A step that waits a little for searches; one that is held up before it waits is none."""
    before = replicas._awaited
    while replicas._awaited is before:
        with pytest.raises(CircuitOpen):
            replicas.model(ours, time.perf_counter() + 0.2)


def test_where_nobody_lives_a_search_is_waited_for_once() -> None:
    lost = Hanging()
    replicas = Replicas({"http://a": lost})
    wait_in_vain(replicas)
    with pytest.raises(CircuitOpen):
        replicas.model(ours, time.perf_counter() + 1e6)  # would not come back
    lost.release.set()
    while not replicas.live:
        with contextlib.suppress(CircuitOpen):
            replicas.model(ours)


def test_of_several_searches_that_hang_each_is_waited_for_once() -> None:
    """Also where they begin one after the other: steps waited for the two by turns."""
    servers = {"http://a": Hanging(), "http://b": Hanging()}
    replicas = Replicas(servers)
    for late in (True, False):
        servers["http://b"].rests = late
        wait_in_vain(replicas)
    with pytest.raises(CircuitOpen):
        replicas.model(ours, time.perf_counter() + 1e6)  # would not come back
    for server in servers.values():
        server.release.set()


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

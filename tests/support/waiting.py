"""Servers that answer when a test lets them, and several of them."""

import threading
from collections.abc import Sequence
from concurrent.futures import wait
from contextlib import suppress

import pytest

from lenvm_vllm.engine.sessions import Sessions
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.values.client import ValueServerError
from lenvm_vllm.values.replica import Call
from lenvm_vllm.values.replicas import Replicas, rank
from tests.support.toy import SECONDS, Server, request, valued


def shut(server: Server) -> None:
    server.gate = threading.Event()


def two(a: Server, b: Server) -> tuple[list[RequestState], Replicas]:
    """Twenty requests, in the order of the servers that have them."""
    replicas = Replicas({"http://a": a, "http://b": b})
    while len(replicas.live) < 2:
        with suppress(ValueServerError):  # neither has answered yet
            replicas.model(lambda: "ours")
    states = [request(prompt=[1, 2]) for _ in range(20)]
    states.sort(key=lambda state: rank("http://a", state.session) < rank("http://b", state.session))
    return states, replicas


def of(server: Server, states: list[RequestState]) -> list[bool]:
    return [state.session in server.texts for state in states]


def in_vain(sessions: Sessions, states: Sequence[RequestState], seconds: float) -> None:
    """A step that waits so long for an answer that is out, and has no values; one that is held up
    before it waits is none."""
    while True:
        calls = [sent.call for sent in sessions._out]
        assert not any(valued(sessions, states, seconds))
        if any(call._waited for call in calls):
            return


def answers_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is not shut, however long a step waits and a busy machine takes."""
    is_there = Call.is_there

    def there(call: Call, until: float) -> bool:
        assert isinstance(call.replica.client, Server)
        if call.replica.client.gate.is_set():
            wait([call.answer], SECONDS)
        return is_there(call, until)

    monkeypatch.setattr(Call, "is_there", there)

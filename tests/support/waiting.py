"""Servers that answer when a test lets them, and several of them."""

import threading
from contextlib import suppress

from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.values.client import ValueServerError
from lenvm_vllm.values.replicas import Replicas, rank
from tests.support.toy import Server, request


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

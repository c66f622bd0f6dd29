"""Value servers behind one client, and messages to them all."""

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch

from lenvm_vllm.values.replicas import Replicas
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

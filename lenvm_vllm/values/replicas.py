"""Several value servers behind one client: whose a session is, and what becomes of it.

A session belongs to the live replica that its id ranks first (rendezvous hashing, so every
engine that knows the same list agrees) and stays there while that one lives. A lost replica's
sessions go each to its own next one, with their whole text; nobody else's move. A replica that
comes back, or a new one, gets new sessions only: to move an old one would compute its text anew.

A lost replica is looked for beside the steps, so that none of them waits for it.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from lenvm_vllm.settings import Settings
from lenvm_vllm.values.client import CircuitOpen, ValueClient, ValueServerError
from value_server.contract import wire
from value_server.contract.values import logit_in_gamma

logger = logging.getLogger("vllm.lenvm")

MOST_SESSIONS = 1 << 16  # whose places are remembered; one beyond is ranked anew

Answer = tuple[NDArray[np.float32], list[int]]


class OneServer(Protocol):
    """What a replica is asked through; see ValueClient."""

    @property
    def rests(self) -> bool: ...

    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo: ...

    def step(self, request: wire.StepRequest) -> Answer: ...


@dataclass(eq=False)
class _Replica:
    """info: of a live one. search: for a lost one. trouble: the kind that the log has told."""

    url: str
    client: OneServer
    info: wire.ModelInfo | None = None
    search: "Future[wire.ModelInfo] | None" = None
    trouble: str | None = None

    def ask(self, request: wire.StepRequest) -> Answer | ValueServerError:
        try:
            return self.client.step(request)
        except ValueServerError as error:
            return error


def connect(settings: Settings) -> "Replicas":
    """Connects to nothing yet. Raises OSError for a file of the settings that cannot be read."""
    options = settings.connection
    return Replicas({url: ValueClient(url, **options) for url in settings.url})


class Replicas:
    """One or more value servers that answer as one; see ValueClient for what is asked."""

    def __init__(self, clients: Mapping[str, OneServer]) -> None:
        """clients: by URL."""
        self._replicas = [_Replica(url, client) for url, client in clients.items()]
        self._threads = ThreadPoolExecutor(len(clients), thread_name_prefix="lenvm-values")
        self._places: dict[str, _Replica] = {}
        self._met = False
        self._error: ValueServerError | None = None  # the last one that nobody was told
        self._gamma: float | None = None

    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
        """What all live replicas can do. The first call waits for all of them, later ones do not.

        Raises ValueServerError when none lives.
        """
        lost = [replica for replica in self._replicas if replica.info is None]
        for replica in lost:
            if replica.search is None and not replica.client.rests:
                replica.search = self._threads.submit(replica.client.model, fingerprint)
        if not self._met:
            wait([replica.search for replica in lost if replica.search is not None])
            self._met = True
        for replica in lost:
            self._look(replica)
        return self._common([replica.info for replica in self._live() if replica.info])

    @property
    def live(self) -> list[str]:
        """URLs of those that answer."""
        return [replica.url for replica in self._replicas if replica.info]

    def step(self, request: wire.StepRequest) -> Answer:
        """As ValueClient.step; all replicas at the same time. Rows of one that fails are unknown,
        so that they come again with their whole text, and go to another one.

        Raises ValueServerError when no replica is left.
        """
        shares = self._shares(request)
        requests = [part_of(request, rows, closed) for rows, closed in shares.values()]
        # One alone needs no thread: there is nobody to wait for meanwhile.
        run = map if len(shares) == 1 else self._threads.map
        answers = list(run(_Replica.ask, shares, requests))
        logits = np.full(sum(request.candidate_counts), np.nan, dtype=np.float32)
        owner = np.repeat(np.arange(len(request.sessions)), request.candidate_counts)
        unknown: list[int] = []
        for (replica, (rows, _)), answer in zip(shares.items(), answers, strict=True):
            if isinstance(answer, ValueServerError):
                self._lose(replica, answer)
                unknown += rows
                continue
            logits[np.isin(owner, rows)] = self._in_our_gamma(answer[0], replica)
            unknown += [rows[row] for row in answer[1]]
        self._live()
        return logits, unknown

    def _live(self) -> list[_Replica]:
        """Those that answer. Raises ValueServerError when there is none."""
        live = [replica for replica in self._replicas if replica.info is not None]
        if not live:
            error, self._error = self._error, None
            raise error or CircuitOpen("no value server answers")
        return live

    def _shares(self, request: wire.StepRequest) -> dict[_Replica, tuple[list[int], list[str]]]:
        """Rows of a step, and sessions to close, of each replica that is to be asked."""
        shares: dict[_Replica, tuple[list[int], list[str]]] = {}
        for row, session in enumerate(request.sessions):
            shares.setdefault(self._place(session), ([], []))[0].append(row)
        for session in request.closed:
            place = self._places.pop(session, None)
            if place is not None and place.info is not None:  # else it drops the session by itself
                shares.setdefault(place, ([], []))[1].append(session)
        return shares

    def _place(self, session: str) -> _Replica:
        """The replica of a session. Raises ValueServerError when none lives."""
        place = self._places.get(session)
        if place is None or place.info is None:
            place = max(self._live(), key=lambda replica: rank(replica.url, session))
            self._places.pop(session, None)
            self._places[session] = place
            if len(self._places) > MOST_SESSIONS:
                del self._places[next(iter(self._places))]
        return place

    def _look(self, replica: _Replica) -> None:
        """Take what the search for a lost replica has found, once it is over."""
        if replica.search is None or not replica.search.done():
            return
        search, replica.search = replica.search, None
        try:
            replica.info = search.result()
        except ValueServerError as error:
            self._lose(replica, error)
            return
        self._gamma = self._gamma or replica.info.gamma
        if replica.trouble is not None:
            logger.info("value server %s is back", replica.url)
        replica.trouble = None

    def _lose(self, replica: _Replica, error: ValueServerError) -> None:
        replica.info = None
        self._error = error
        if replica.trouble != type(error).__name__:
            replica.trouble = type(error).__name__
            logger.warning("value server %s: %s: %s", replica.url, replica.trouble, error)

    def _common(self, infos: list[wire.ModelInfo]) -> wire.ModelInfo:
        """Limits that all of them keep."""
        assert self._gamma is not None
        names = ("vocab_size", "max_position", "max_sessions", "max_candidates")
        limits = {name: min(getattr(info, name) for info in infos) for name in names}
        return msgspec.structs.replace(infos[0], gamma=self._gamma, **limits)

    def _in_our_gamma(self, z: NDArray[np.float32], replica: _Replica) -> NDArray[np.float32]:
        """While checkpoints change, replicas may speak of the same lengths by another gamma."""
        assert replica.info is not None
        assert self._gamma is not None
        if replica.info.gamma == self._gamma:
            return z
        exact = torch.from_numpy(z.astype(np.float64))
        return logit_in_gamma(exact, replica.info.gamma, self._gamma).float().numpy()


def rank(url: str, session: str) -> bytes:
    """How much a session belongs to a replica; the highest has it."""
    return hashlib.blake2b(f"{url} {session}".encode(), digest_size=8).digest()


def part_of(request: wire.StepRequest, rows: list[int], closed: list[str]) -> wire.StepRequest:
    """The request with these rows only, and these sessions to close."""
    if len(rows) == len(request.sessions):
        return msgspec.structs.replace(request, closed=closed)
    return wire.StepRequest(
        sessions=[request.sessions[row] for row in rows],
        starts=[request.starts[row] for row in rows],
        token_counts=[request.token_counts[row] for row in rows],
        tokens=_ids_of(rows, request.tokens, request.token_counts),
        candidate_counts=[request.candidate_counts[row] for row in rows],
        candidates=_ids_of(rows, request.candidates, request.candidate_counts),
        closed=closed,
    )


def _ids_of(rows: list[int], ids: bytes, counts: list[int]) -> bytes:
    owner = np.repeat(np.arange(len(counts)), counts)
    return wire.pack_ids(wire.unpack_ids(ids)[np.isin(owner, rows)])

"""Several value servers behind one client: whose a session is, and what becomes of it.

A session belongs to the live replica that its id ranks first (rendezvous hashing, so every
engine that knows the same list agrees) and stays there while that one lives. A lost replica's
sessions go each to its own next one, with their whole text; nobody else's move. A replica that
comes back, or a new one, gets new sessions only: to move an old one would compute its text anew.

Each replica has a thread, which carries one message at a time. A step waits for its answer as
long as it may; while the answer is still out, that replica is not asked, and nobody waits for it.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from lenvm_vllm.settings import Settings
from lenvm_vllm.values.client import CircuitOpen, ValueClient, ValueServerError
from lenvm_vllm.values.patience import Patience
from value_server.contract import wire
from value_server.contract.values import logit_in_gamma

logger = logging.getLogger("vllm.lenvm")

MOST_SESSIONS = 1 << 16  # whose places are remembered; one beyond is ranked anew


class OneServer(Protocol):
    """What a replica is asked through; see ValueClient."""

    @property
    def rests(self) -> bool: ...

    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo: ...

    def step(self, request: wire.StepRequest) -> wire.StepReply: ...


@dataclass(eq=False)
class _Replica:
    """info: of a live one. search: for a lost one. trouble: the kind that the log has told.

    call: whose answer nobody has read yet. patience: how long its answers are waited for.
    closed: sessions of it that are over, and it has not been told.
    """

    url: str
    client: OneServer
    thread: ThreadPoolExecutor
    info: wire.ModelInfo | None = None
    search: "Future[wire.ModelInfo] | None" = None
    trouble: str | None = None
    call: "Call | None" = None
    patience: Patience = field(default_factory=Patience)
    closed: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    """A message to one server. rows: those of the step that it has. candidates: of all of them.

    seconds: that its answer may take.
    """

    replica: _Replica
    rows: list[int]
    candidates: int
    seconds: float
    answer: "Future[tuple[wire.StepReply, float]]"
    sent: float = field(default_factory=time.perf_counter)
    _waited: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether its answer, which is there, came because the server's time was up."""
        return self.answer.result()[1] > self.seconds / 2

    def is_there(self, until: float) -> bool:
        """Whether it is answered; waits for it until then, on the clock `perf_counter`, but once,
        no longer than such an answer may take, and not for a server that is slow."""
        left = min(until, self.sent + self.seconds) - time.perf_counter()
        if left > 0 and not self._waited and not self.replica.patience.is_slow:
            self._waited = True
            wait([self.answer], left)
        return self.answer.done()


# The message with these rows of the step, these sessions to close, and the seconds that its answer
# may take; called in a thread.
Build = Callable[[list[int], list[str], float], wire.StepRequest]


def connect(settings: Settings) -> "Replicas":
    """Connects to nothing yet. Raises OSError for a file of the settings that cannot be read."""
    options = settings.connection
    return Replicas({url: ValueClient(url, **options) for url in settings.url})


class Replicas:
    """One or more value servers that answer as one. For one thread at a time."""

    def __init__(self, clients: Mapping[str, OneServer]) -> None:
        """clients: by URL."""
        self._replicas = [
            _Replica(url, client, ThreadPoolExecutor(1, thread_name_prefix="lenvm-values"))
            for url, client in clients.items()
        ]
        self._places: dict[str, _Replica] = {}
        self._error: ValueServerError | None = None  # the last one that nobody was told
        self._gamma: float | None = None
        self._awaited: set[Future[wire.ModelInfo]] = set()  # searches that a step has waited for

    def model(self, fingerprint: Callable[[], str | None], until: float = 0.0) -> wire.ModelInfo:
        """What all live replicas can do. Looks for lost ones; where none lives, until then, on the
        clock `perf_counter`, but for no search twice.

        Raises ValueServerError when none lives.
        """
        lost = [replica for replica in self._replicas if replica.info is None]
        for replica in lost:
            if replica.search is None and not replica.client.rests:
                replica.search = replica.thread.submit(replica.client.model, fingerprint)
        left = until - time.perf_counter()
        new = {replica.search for replica in lost if replica.search} - self._awaited
        if len(lost) == len(self._replicas) and new and left > 0:
            self._awaited = new
            wait(new, left)
        for replica in lost:
            self._look(replica)
        return self._common([replica.info for replica in self._live() if replica.info])

    @property
    def live(self) -> list[str]:
        """URLs of those that answer."""
        return [replica.url for replica in self._replicas if replica.info]

    def close(self, session: str) -> None:
        """This session is over: tell its server with the next message."""
        place = self._places.pop(session, None)
        if place is not None and place.info is not None:  # else it drops the session by itself
            place.closed.append(session)

    @property
    def has_closed(self) -> bool:
        """Whether a server that could be told does not know yet of a session that is over."""
        return any(replica.closed and replica.call is None for replica in self._replicas)

    def send(
        self,
        sessions: Sequence[str],
        candidates: Sequence[int],
        build: Build,
        least: float,
        most: float,
    ) -> list[Call]:
        """A message to each replica that has one of the sessions, or one to close, all at the same
        time; a row whose replica has not answered yet is in none of them.

        candidates: their number in each row. least, most: seconds that an answer may take.
        Raises ValueServerError when no replica is left.
        """
        shares: dict[_Replica, list[int]] = {r: [] for r in self._replicas if r.closed}
        for row, session in enumerate(sessions):
            shares.setdefault(self._place(session), []).append(row)
        calls = []
        for replica, rows in shares.items():
            if replica.call is None:
                closed, replica.closed = replica.closed, []
                asked = sum(candidates[row] for row in rows)
                seconds = replica.patience.seconds(asked, least, most)
                make = partial(build, rows, closed, seconds)
                context = copy_context()  # the span that the message is part of
                ask = partial(_ask, replica.client, make, time.perf_counter())
                answer = replica.thread.submit(context.run, ask)
                replica.call = Call(replica, rows, asked, seconds, answer)
                calls.append(replica.call)
        return calls

    def read(self, call: Call) -> wire.StepReply | None:
        """The answer, which is there, in the gamma of all; None where there is none, and then the
        replica is lost."""
        replica = call.replica
        replica.call = None
        try:
            reply, took = call.answer.result()
        except ValueServerError as error:
            self._lose(replica, error)
            return None
        z = self._in_our_gamma(wire.unpack_logits(reply.logits), replica)
        if call.candidates:
            # Where its time was up the server answered with what it had: that tells of no usual
            # time. Without any values the time was spent in vain; an answer at once is no loss.
            cut = call.is_cut and bool(np.isnan(z).any())
            in_vain = cut and bool(np.isnan(z).all())
            if in_vain or not cut:
                self._note(call, took, in_vain or took > call.seconds)
        return msgspec.structs.replace(reply, logits=wire.pack_logits(z))

    def _note(self, call: Call, took: float, late: bool) -> None:
        replica, patience = call.replica, call.replica.patience
        was_slow = patience.is_slow
        patience.note(call.candidates, took, call.seconds, late)
        if patience.is_slow and not was_slow:
            logger.warning(
                "value server %s: no values in time (%.0f ms, a step waits %.0f ms); steps go on"
                " without waiting until they come in time again",
                *(replica.url, 1000 * took, 1000 * call.seconds),
            )
        if was_slow and not patience.is_slow:
            logger.info("value server %s: its values are in time again", replica.url)

    def _live(self) -> list[_Replica]:
        """Those that answer. Raises ValueServerError when there is none."""
        live = [replica for replica in self._replicas if replica.info is not None]
        if not live:
            error, self._error = self._error, None
            raise error or CircuitOpen("no value server answers")
        return live

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
        replica.patience.forget()
        if replica.trouble is not None:
            logger.info("value server %s is back", replica.url)
        replica.trouble = None

    def _lose(self, replica: _Replica, error: ValueServerError) -> None:
        replica.info, replica.closed = None, []
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
        if replica.info is None or replica.info.gamma == self._gamma:
            return z
        assert self._gamma is not None
        exact = torch.from_numpy(z.astype(np.float64))
        return logit_in_gamma(exact, replica.info.gamma, self._gamma).float().numpy()


def _ask(
    client: OneServer, make: Callable[[], wire.StepRequest], begin: float
) -> tuple[wire.StepReply, float]:
    """The answer, and the seconds since `begin`, on the clock `perf_counter`."""
    reply = client.step(make())
    return reply, time.perf_counter() - begin


def rank(url: str, session: str) -> bytes:
    """How much a session belongs to a replica; the highest has it."""
    return hashlib.blake2b(f"{url} {session}".encode(), digest_size=8).digest()

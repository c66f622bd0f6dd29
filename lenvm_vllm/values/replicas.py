"""Several value servers behind one client: whose a session is, and what becomes of it.

A session belongs to the live replica that its id ranks first (rendezvous hashing, so every
engine that knows the same list agrees) and stays there while that one lives. A lost replica's
sessions go each to its own next one, with their whole text; nobody else's move. A replica that
comes back, or a new one, gets new sessions only: to move an old one would compute its text anew.

Texts of a LoRA adapter with value servers of its own belong to those; where none of them lives, to
the base model's. Those of another adapter are asked about no text but its own.

Each replica has a thread, which carries one message at a time. A step waits for its answer as
long as it may; while the answer is still out, that replica is not asked, and nobody waits for it.

A replica whose model has a lookahead head is asked for a query of each row, and its keys make
values of it; one that has none tells the values of the candidates that it is asked about.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import partial

import msgspec
import numpy as np
import torch
from torch import Tensor

from lenvm_vllm.settings import Settings
from lenvm_vllm.values.client import CircuitOpen, ValueClient, ValueServerError
from lenvm_vllm.values.replica import Call, OneServer, Replica, Served, ask, rank, search
from value_server.contract import wire
from value_server.contract.values import logit_in_gamma

logger = logging.getLogger("vllm.lenvm")

MOST_SESSIONS = 1 << 16  # whose places are remembered; one beyond is ranked anew

# The message with these rows of the step, these sessions to close, the seconds that its answer may
# take, and the rank of the queries that are asked for; called in a thread.
Build = Callable[[list[int], list[str], float, int], wire.StepRequest]


def connect(settings: Settings) -> "Replicas":
    """Connects to nothing yet. Raises OSError or ValueError for a file of the settings that cannot
    be used."""
    options = settings.connection
    clients = {url: ValueClient(url, **options) for url in settings.servers}
    return Replicas(clients, settings.scoring != "exact", {**settings.adapters, "": settings.url})


class Replicas:
    """One or more value servers that answer as one. For one thread at a time."""

    def __init__(
        self,
        clients: Mapping[str, OneServer],
        looks_ahead: bool = True,
        adapters: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """clients: by URL. looks_ahead: whether lookahead heads are used. adapters: URLs of the
        servers of an adapter's texts, by its name, "" for all others; None: all are for all."""
        self._looks_ahead = looks_ahead
        self._replicas = [
            Replica(url, client, ThreadPoolExecutor(1, thread_name_prefix="lenvm-values"))
            for url, client in clients.items()
        ]
        self._replicas_of = {
            name: [replica for replica in self._replicas if replica.url in urls]
            for name, urls in (adapters or {"": list(clients)}).items()
        }
        self._adapters: dict[str, str] = {}  # of sessions, where it has servers of its own
        self._places: dict[str, Replica] = {}
        self._error: ValueServerError | None = None  # by which the last one was lost
        self._gamma: float | None = None
        self._awaited: set[Future[Served]] = set()  # searches that a step has waited for

    def model(self, fingerprint: Callable[[], str | None], until: float = 0.0) -> wire.ModelInfo:
        """What all live replicas can do. Looks for lost ones; where none lives, until then, on the
        clock `perf_counter`, but for no search twice.

        Raises ValueServerError when none lives.
        """
        lost = [replica for replica in self._replicas if replica.served is None]
        for replica in lost:
            if replica.search is None and not replica.client.rests:
                found = partial(search, replica.client, fingerprint, self._looks_ahead)
                replica.search = replica.thread.submit(found)
        left = until - time.perf_counter()
        searches = {replica.search for replica in lost if replica.search}
        new = searches - self._awaited
        if len(lost) == len(self._replicas) and new and left > 0:
            self._awaited = searches
            wait(new, left)
        for replica in lost:
            self._look(replica)
        return self._common([replica.served.info for replica in self._live() if replica.served])

    @property
    def live(self) -> list[str]:
        """URLs of those that answer."""
        return [replica.url for replica in self._replicas if replica.served]

    @property
    def any_looks_ahead(self) -> bool:
        """Whether one of them has a lookahead head that is used."""
        return any(replica.served and replica.served.keys for replica in self._replicas)

    def looks_ahead(self, session: str) -> bool:
        """Whether the replica of a session has one. Raises ValueServerError when none lives."""
        place = self._place(session)
        return place is not None and place.served is not None and place.served.keys is not None

    def sees(self, session: str) -> bool:
        """Whether the replica of a session, if one lives at all, sees pictures."""
        place = self._place(session) if self.live else None
        return place is None or (place.served is not None and place.served.info.sees_pictures)

    def assign(self, session: str, adapter: str) -> None:
        """The text of this session, which is new, is written by this adapter."""
        if adapter and adapter in self._replicas_of:
            self._adapters[session] = adapter

    def close(self, session: str) -> None:
        """This session is over: tell its server with the next message."""
        self._adapters.pop(session, None)
        place = self._places.pop(session, None)
        if place is not None and place.served is not None:  # else it drops the session by itself
            place.closed.append(session)

    @property
    def has_closed(self) -> bool:
        """Whether a server that could be told does not know yet of a session that is over."""
        return any(replica.closed and replica.call is None for replica in self._replicas)

    def is_free(self, session: str) -> bool:
        """Whether a replica of a session lives and has no message out; also where none lives at
        all, which `send` then says."""
        if not any(replica.served for replica in self._replicas):
            return True
        place = self._place(session)
        return place is not None and place.call is None

    def hear(self, session: str, until: float) -> None:
        """Wait, as `Call.is_there` does, for the answer to a message to a session's replica in
        which nothing was asked: left alone, it was seen to take up to a second beside a busy
        engine, and the rows behind it had no values."""
        place = self._place(session)
        if place is not None and place.call is not None and not place.call.candidates:
            place.call.is_there(until)

    def send(
        self,
        sessions: Sequence[str],
        candidates: Sequence[int],
        build: Build,
        least: float,
        most: float,
        queries: bool = False,
    ) -> list[Call]:
        """A message to each replica that has one of the sessions, or one to close, all at the same
        time; a row whose replica has not answered yet, or that has none, is in none of them.

        candidates: their number in each row. least, most: seconds that an answer may take, if it
        is to have values. queries: ask for those of all rows whose replica looks ahead.
        Raises ValueServerError when no replica is left.
        """
        shares: dict[Replica, list[int]] = {r: [] for r in self._replicas if r.closed}
        for row, session in enumerate(sessions):
            if (place := self._place(session)) is not None:
                shares.setdefault(place, []).append(row)
        calls = []
        for replica, rows in shares.items():
            served = replica.served
            if replica.call is None and served is not None:
                closed, replica.closed = replica.closed, []
                keys = served.keys if queries and rows else None
                asked = sum(candidates[row] for row in rows) + len(rows) * bool(keys)
                seconds = replica.patience.seconds(asked, least, most) if asked else math.inf
                make = partial(build, rows, closed, seconds, served.rank if keys else 0)
                context = copy_context()  # the span that the message is part of
                send = partial(ask, replica.client, make, time.perf_counter())
                answer = replica.thread.submit(context.run, send)
                gamma = served.info.gamma
                replica.call = Call(replica, rows, asked, gamma, keys, seconds, answer)
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
        replica.trouble = None
        if call.candidates:
            # Where its time was up the server answered with what it had, and without any values,
            # as where no text has room, at once: neither tells how long values usually take. Only
            # time that was spent in vain counts.
            unknown = np.isnan(wire.unpack_logits(reply.logits + reply.queries))
            in_vain = call.is_cut and bool(unknown.all())
            usual = not (unknown.any() if call.is_cut else unknown.all())
            if in_vain or usual:
                self._note(call, took, in_vain or took > call.seconds)
        z = torch.tensor(wire.unpack_logits(reply.logits))
        if call.gamma != self._gamma:
            z = self._in_our_gamma(z.double(), call).float()
        return msgspec.structs.replace(reply, logits=wire.pack_logits(z.numpy()))

    def after(
        self, call: Call, reply: wire.StepReply, rows: Sequence[int], tokens: Tensor
    ) -> Tensor:
        """(B, K) float64 logits after each of `tokens` (B, K), in the gamma of all, by the queries
        of the answer to `call`; NaN in rows that have none in time.

        rows: B of those of the call.
        """
        assert call.keys is not None
        queries = torch.tensor(wire.unpack_queries(reply.queries, call.keys.rank))
        return self._in_our_gamma(call.keys.after(queries[rows], tokens).double(), call)

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

    def _live(self) -> list[Replica]:
        """Those that answer. Raises ValueServerError when there is none."""
        live = [replica for replica in self._replicas if replica.served is not None]
        if not live:
            raise self._error.bare() if self._error else CircuitOpen("no value server answers")
        return live

    def _place(self, session: str) -> Replica | None:
        """The replica of a session; None where of its own, and of the base model's, none lives.
        Raises ValueServerError when none lives at all."""
        place = self._places.get(session)
        if place is None or place.served is None:
            live = self._live()
            for name in (self._adapters.get(session, ""), ""):
                if own := [replica for replica in self._replicas_of[name] if replica in live]:
                    break
            else:
                return None
            place = max(own, key=lambda replica: rank(replica.url, session))
            self._places.pop(session, None)
            self._places[session] = place
            if len(self._places) > MOST_SESSIONS:
                del self._places[next(iter(self._places))]
        return place

    def _look(self, replica: Replica) -> None:
        """Take what the search for a lost replica has found, once it is over."""
        if replica.search is None or not replica.search.done():
            return
        search, replica.search = replica.search, None
        try:
            replica.served = search.result()
        except ValueServerError as error:
            self._lose(replica, error)
            return
        self._error = None
        self._gamma = self._gamma or replica.served.info.gamma
        replica.patience.forget()
        if replica.trouble is not None and not replica.is_back:
            logger.info("value server %s is back", replica.url)
            replica.is_back = True

    def _lose(self, replica: Replica, error: ValueServerError) -> None:
        replica.served, replica.closed = None, []
        self._error = error.bare()
        if replica.trouble != type(error).__name__:
            replica.trouble, replica.is_back = type(error).__name__, False
            logger.warning("value server %s: %s: %s", replica.url, replica.trouble, error)

    def _common(self, infos: list[wire.ModelInfo]) -> wire.ModelInfo:
        """Limits that all of them keep."""
        assert self._gamma is not None
        names = ("vocab_size", "max_position", "max_sessions", "max_candidates")
        limits = {name: min(getattr(info, name) for info in infos) for name in names}
        return msgspec.structs.replace(infos[0], gamma=self._gamma, **limits)

    def _in_our_gamma(self, z: Tensor, call: Call) -> Tensor:
        """While checkpoints change, replicas may speak of the same lengths by another gamma."""
        assert self._gamma is not None
        return logit_in_gamma(z, call.gamma, self._gamma)

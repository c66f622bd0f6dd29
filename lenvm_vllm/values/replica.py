"""One value server of several: what is known of it, and the message that is out to it."""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

from lenvm_vllm.values.lookahead import Keys
from lenvm_vllm.values.patience import Patience
from value_server.contract import wire


class OneServer(Protocol):
    """What a replica is asked through; see ValueClient."""

    @property
    def rests(self) -> bool: ...

    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo: ...

    def keys(self, info: wire.ModelInfo) -> Keys: ...

    def step(self, request: wire.StepRequest) -> wire.StepReply: ...


@dataclass(frozen=True, eq=False)
class Served:
    """What a replica serves. keys: of its lookahead head; None: there is none, or none is used."""

    info: wire.ModelInfo
    keys: Keys | None

    @property
    def rank(self) -> int:
        return self.info.lookahead_rank if self.keys else 0


@dataclass(eq=False)
class Replica:
    """served: of a live one. search: for a lost one. trouble: the kind that the log has told.
    is_back: whether the log says that it is back since; until it answers, nothing more is told.

    call: whose answer nobody has read yet. patience: how long its answers are waited for.
    closed: sessions of it that are over, and it has not been told.
    """

    url: str
    client: OneServer
    thread: ThreadPoolExecutor
    served: Served | None = None
    search: "Future[Served] | None" = None
    trouble: str | None = None
    is_back: bool = False
    call: "Call | None" = None
    patience: Patience = field(default_factory=Patience)
    closed: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    """A message to one server. rows: those of the step that it has. candidates: of all of them; a
    row's query counts as one. keys: that the queries of its answer are for, None: it has none.

    seconds: that its answer may take.
    """

    replica: Replica
    rows: list[int]
    candidates: int
    gamma: float
    keys: Keys | None
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


def search(client: OneServer, fingerprint: Callable[[], str | None], looks_ahead: bool) -> Served:
    """What it serves; also the keys, which are several MB."""
    info = client.model(fingerprint)
    return Served(info, client.keys(info) if looks_ahead and info.lookahead_rank else None)


def ask(
    client: OneServer, make: Callable[[], wire.StepRequest], begin: float
) -> tuple[wire.StepReply, float]:
    """The answer, and the seconds since `begin`, on the clock `perf_counter`."""
    reply = client.step(make())
    return reply, time.perf_counter() - begin


def rank(url: str, session: str) -> bytes:
    """How much a session belongs to a replica; the highest has it."""
    return hashlib.blake2b(f"{url} {session}".encode(), digest_size=8).digest()

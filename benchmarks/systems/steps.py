"""Steps of a value server as the plugin asks for them, made by hand."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from value_server.contract import wire
from value_server.engine.job import Row


class Client(Protocol):
    """See ValueClient."""

    def step(self, request: wire.StepRequest) -> wire.StepReply: ...


def step_request(rows: Sequence[Row], closed: Sequence[str] = ()) -> wire.StepRequest:
    """The message of these rows, with the sessions that are over."""
    return wire.StepRequest(
        sessions=[row.name for row in rows],
        starts=[row.start for row in rows],
        token_counts=[len(row.tokens) for row in rows],
        tokens=wire.pack_ids([token for row in rows for token in row.tokens]),
        candidate_counts=[len(row.candidates) for row in rows],
        candidates=wire.pack_ids([token for row in rows for token in row.candidates]),
        closed=list(closed),
    )


class Sessions:
    """Texts that grow, each a session of a value server.

    texts: token ids by session. sent: how many of them the server has.
    """

    def __init__(self) -> None:
        self.texts: dict[str, list[int]] = {}
        self.sent: dict[str, int] = {}

    def open(self, name: str, text: list[int]) -> None:
        self.texts[name], self.sent[name] = text, 0

    def close(self, name: str) -> None:
        del self.texts[name], self.sent[name]

    def ask(
        self, client: Client, candidates: Mapping[str, Sequence[int]], closed: Sequence[str] = ()
    ) -> dict[str, NDArray[np.float32]]:
        """One step of the sessions that have candidates: the logits of those that have some.

        Each goes on the next time from what the server has of it. Raises ValueServerError.
        """
        rows = [
            Row(name, self.sent[name], self.texts[name][self.sent[name] :], own)
            for name, own in candidates.items()
        ]
        reply = client.step(step_request(rows, closed))
        self.sent.update(zip(candidates, reply.held, strict=True))
        ends = np.cumsum([len(row.candidates) for row in rows])
        logits = np.split(wire.unpack_logits(reply.logits), ends[:-1])
        answers = zip(candidates, logits, strict=True)
        return {name: own for name, own in answers if not np.isnan(own).any()}

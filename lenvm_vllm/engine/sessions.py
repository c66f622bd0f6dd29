"""The texts as the value server holds them: each step tells it what is new, and asks for values.

Knows nothing of vLLM: it takes request states, and a client that answers `step`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.telemetry.metrics import Counters
from value_server.contract import wire

logger = logging.getLogger("vllm.lenvm")


class Client(Protocol):
    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo: ...

    def step(self, request: wire.StepRequest) -> tuple[NDArray[np.float32], list[int]]: ...


class Sessions:
    def __init__(
        self, client: Client, fingerprint: Callable[[], str | None], counters: Counters
    ) -> None:
        """fingerprint: of the tokenizer that vLLM serves; asked for once per connection."""
        self._client = client
        self._fingerprint = fingerprint
        self._counters = counters
        self._closed: list[str] = []
        self._told: set[str] = set()

    def model(self) -> wire.ModelInfo:
        """Raises ValueServerError."""
        return self._client.model(self._fingerprint)

    def close(self, state: RequestState) -> None:
        """Tell the server with the next step that this request is over."""
        if state.sent:
            self._closed.append(state.session)

    @property
    def has_closed(self) -> bool:
        """Whether the server does not know yet of a request that is over."""
        return bool(self._closed)

    def tell_closed(self) -> None:
        """A call for nothing else, where no row is asked about. Raises ValueServerError."""
        if self._closed:
            self._ask([], [])

    def askable(self, states: dict[int, RequestState], info: wire.ModelInfo) -> list[int]:
        """Rows whose values the server can tell. The others are counted, and why is logged once."""
        why = {row: _why_not(state, info) for row, state in states.items()}
        rows = [row for row, reason in why.items() if reason is None]
        reasons = [reason for reason in why.values() if reason]
        reasons += [
            f"a step has more rows than the value server takes, {info.max_sessions}"
            for _ in rows[info.max_sessions :]
        ]
        self._counters.add("unguided_rows", len(reasons))
        for reason in sorted({*reasons} - self._told):
            logger.warning("length targets: %s; such texts have guard rails only", reason)
            self._told.add(reason)
        return rows[: info.max_sessions]

    def values(self, states: Sequence[RequestState], tokens: Tensor, wanted: Tensor) -> Tensor:
        """(B, K) float64 value logits of `tokens` (B, K) where `wanted`, NaN where there is none.

        Raises ValueServerError.
        """
        ids = [row[mask].tolist() for row, mask in zip(tokens, wanted, strict=True)]
        z = torch.full(wanted.shape, torch.nan, dtype=torch.float64)
        asked = list(range(len(states)))
        for _ in range(2):  # a session that the server does not hold is told again, with its text
            answer, unknown = self._ask([states[i] for i in asked], [ids[i] for i in asked])
            mask = torch.zeros_like(wanted)
            mask[asked] = wanted[asked]
            z[mask] = torch.from_numpy(answer.astype(np.float64))
            asked = [asked[row] for row in sorted(set(unknown))]  # in the order of `mask`
            for i in asked:
                states[i].sent = 0
            if not asked:
                break
        z[asked] = torch.nan  # unknown twice: unguided in this step
        return z

    def _ask(
        self, states: Sequence[RequestState], ids: list[list[int]]
    ) -> tuple[NDArray[np.float32], list[int]]:
        """One call; a row whose session is held counts its tokens as sent."""
        tokens = [state.unsent() or [] for state in states]
        request = wire.StepRequest(
            sessions=[state.session for state in states],
            starts=[state.sent for state in states],
            token_counts=[len(t) for t in tokens],
            tokens=wire.pack_ids([token for t in tokens for token in t]),
            candidate_counts=[len(c) for c in ids],
            candidates=wire.pack_ids([token for c in ids for token in c]),
            closed=self._closed,
        )
        started = time.perf_counter()
        try:
            values, unknown = self._client.step(request)
        finally:
            self._counters.add("value_seconds", time.perf_counter() - started)
        self._closed = []
        for row, state in enumerate(states):
            if row not in unknown:
                state.sent += len(tokens[row])
        return values, unknown


def _why_not(state: RequestState, info: wire.ModelInfo) -> str | None:
    """Why the server cannot take this request's text and one token more, "" where the text is
    not known yet; None where it can."""
    tokens = state.unsent()
    if tokens is None:
        return "" if state.prompt_ids is not None else "a prompt has no tokens"
    if state.length >= info.max_position:
        return f"a text is longer than the value model takes, {info.max_position} tokens"
    if max(tokens, default=0) >= info.vocab_size:
        return f"a text has tokens that the value model does not know, from {info.vocab_size} on"
    return None

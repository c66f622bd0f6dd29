"""From the logits of guided rows to their steered distribution: asks for values, then steers.

Knows nothing of vLLM: it takes request states and logits, and a client that answers `step`.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.settings import Settings
from lenvm_vllm.steering.candidates import Candidates, Cut, Writes, cut_candidates, plan_writes
from lenvm_vllm.steering.policies import MODES, Goals, expected_rest, steer
from lenvm_vllm.text.sentences import Sentences
from value_server.contract import wire
from value_server.contract.values import remaining_goal


class Client(Protocol):
    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo: ...

    def step(self, request: wire.StepRequest) -> tuple[NDArray[np.float32], list[int]]: ...


class Guide:
    """Steers the rows of one step with one call to the value server."""

    def __init__(
        self,
        client: Client,
        settings: Settings,
        fingerprint: Callable[[], str | None],
        sentences: Sentences | None = None,
    ) -> None:
        """fingerprint: of the tokenizer that vLLM serves; asked for once per connection."""
        self._client = client
        self._settings = settings
        self._fingerprint = fingerprint
        self._sentences = sentences
        self._closing_ids = torch.tensor(sentences.ids if sentences else [], dtype=torch.long)
        self._closed: list[str] = []
        self.waited_s = 0.0  # for answers, so far
        self.left_out: Counter[str] = Counter()  # rows so far that could not be asked, by why

    def close(self, state: RequestState) -> None:
        """Tell the server with the next step that this request is over."""
        if state.sent:
            self._closed.append(state.session)

    def plan(self, logits: Tensor, states: dict[int, RequestState]) -> Writes | None:
        """How to change `logits` (batch, V) so that the rows in `states` are steered.

        None: change nothing. Raises ValueServerError.
        """
        if not states and not self._closed:
            return None
        info = self._client.model(self._fingerprint)
        rows = self._askable({row: s for row, s in states.items() if _has_turn(s)}, info)
        cuts = [cut_of(states[row], self._settings) for row in rows]
        # Ids that the value model does not know are the padding of vLLM's vocabulary.
        known = logits[:, : info.vocab_size]
        if rows:
            width = min(self._settings.max_candidates, info.max_candidates)
            candidates = cut_candidates(known[rows], cuts, width)
            asking = [states[row] for row in rows]
            wanted = candidates.scored(*shares_of(asking, self._settings))
            open_rows = _undecided(candidates, wanted, asking)
            rows, cuts = [rows[i] for i in open_rows], [cuts[i] for i in open_rows]
            candidates, wanted = _pick(candidates, open_rows), wanted[open_rows]
        if not rows:
            if self._closed:
                self._ask([], [])
            return None
        asking = [states[row] for row in rows]
        for state in asking:
            state.valued = False  # until they are there
        z = self._scores(wanted, candidates.ids, asking)
        known_z = ~(z.isnan() & wanted).any(-1)
        keep = known_z.nonzero()[:, 0].tolist()
        if not keep:
            return None
        candidates = _pick(candidates, keep)
        rows, cuts, z = [rows[i] for i in keep], [cuts[i] for i in keep], z[known_z]
        steered = [states[row] for row in rows]
        goals = goals_of(steered, info.gamma, self._settings.max_kl)
        closes = self._closes(candidates, steered, goals)
        ends = candidates.log_p0, candidates.own_end
        log_q, log_p0 = steer(candidates.log_q, *ends, z, closes, goals)
        rest = expected_rest(log_q, log_p0, z, info.gamma)
        _note(steered, goals.raises_ends, log_p0 == 0, rest)
        return plan_writes(rows, cuts, candidates, log_q, log_p0, known.shape[-1])

    def _askable(self, states: dict[int, RequestState], info: wire.ModelInfo) -> list[int]:
        """Rows whose values the server can tell; the others are counted."""
        why = {row: _why_not(state, info) for row, state in states.items()}
        rows = [row for row, reason in why.items() if reason is None]
        self.left_out.update(reason for reason in why.values() if reason)
        if len(rows) > info.max_sessions:
            reason = f"a step has more rows than the value server takes, {info.max_sessions}"
            self.left_out[reason] += len(rows) - info.max_sessions
        return rows[: info.max_sessions]

    def _closes(
        self, candidates: Candidates, states: Sequence[RequestState], goals: Goals
    ) -> Tensor:
        """(B, K) bool: candidates that end a sentence, of texts that are led to the end of one."""
        closes = torch.isin(candidates.ids, self._closing_ids) & candidates.kept
        closes &= goals.heeds_sentences[:, None]
        for row, place in closes.nonzero().tolist():
            assert self._sentences is not None
            token = int(candidates.ids[row, place])
            closes[row, place] = self._sentences.ends(states[row].output_ids, token)
        return closes

    def _scores(self, wanted: Tensor, tokens: Tensor, states: Sequence[RequestState]) -> Tensor:
        """(B, K) float64 value logits of `tokens` where `wanted`, NaN where there is none."""
        ids = [row[mask].tolist() for row, mask in zip(tokens, wanted, strict=True)]
        z = torch.full(wanted.shape, torch.nan, dtype=torch.float64)
        asked = list(range(len(states)))
        for attempt in range(2):
            answer, unknown = self._ask([states[i] for i in asked], [ids[i] for i in asked])
            mask = torch.zeros_like(wanted)
            mask[asked] = wanted[asked]
            z[mask] = torch.from_numpy(answer.astype(np.float64))
            asked = [asked[row] for row in sorted(set(unknown))]  # in the order of `mask`
            for i in asked:
                states[i].sent = 0
            if not asked or attempt:
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
            answer = self._client.step(request)
        finally:
            self.waited_s += time.perf_counter() - started
        self._closed = []
        for row, state in enumerate(states):
            if row not in answer[1]:
                state.sent += len(tokens[row])
        return answer


def cut_of(state: RequestState, settings: Settings) -> Cut:
    """The candidate cut of a request: its own, or the plugin's where it sets none."""
    tilt = state.target.mode == "tilt"
    own = state.own
    cut = Cut(
        # A greedy request is steered at T = 1; vLLM then takes the most probable token.
        temperature=state.temperature or 1.0,
        top_k=own.top_k,
        top_p=own.top_p,
        min_p=own.min_p,
        eos_ids=state.ends,
    )
    if tilt:
        unset = not own.top_k and own.top_p >= 1 and not own.min_p
        return replace(cut, min_p=settings.tilt_min_p) if unset else cut
    top_k = own.top_k or settings.top_k
    top_p = own.top_p if own.top_p < 1 else settings.top_p
    return replace(
        cut,
        top_k=top_k,
        top_p=top_p,
        end_top_k=max(top_k, settings.top_k),
        end_top_p=max(top_p, settings.top_p),
    )


def shares_of(states: Sequence[RequestState], settings: Settings) -> tuple[Tensor, Tensor]:
    """(B,) share of each request's candidates, by probability, and (B,) how many are scored."""
    greedy = torch.tensor([state.target.policy == "greedy" for state in states])
    mass = torch.full(greedy.shape, settings.scored_mass, dtype=torch.float64)
    most = torch.full(greedy.shape, settings.max_scored)
    return mass.masked_fill(greedy, 1), most.masked_fill(greedy, settings.max_candidates)


def goals_of(states: Sequence[RequestState], gamma: float, max_kl: float) -> Goals:
    """What each request wants of this step."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    targets, aims = [state.target for state in states], [state.aim for state in states]
    so_far = [state.generated for state in states]
    return Goals(
        mode=torch.tensor([MODES.index(aim.mode) for aim in aims]),
        greedy=torch.tensor([target.policy == "greedy" for target in targets]),
        remaining=column([remaining_goal(a.low, n) for a, n in zip(aims, so_far, strict=True)]),
        ceiling=column([remaining_goal(a.high, n) for a, n in zip(aims, so_far, strict=True)]),
        landing=column([aim.landing for aim in aims]),
        beta=column([target.beta or 0.0 for target in targets]),
        max_kl=column([max_kl if t.max_kl is None else t.max_kl for t in targets]),
        gamma=gamma,
    )


def _note(
    states: Sequence[RequestState], landing: Tensor, forced: Tensor, expected: Tensor
) -> None:
    """Keep what the API server may be told of this step."""
    told = zip(states, landing.tolist(), forced.tolist(), expected.tolist(), strict=True)
    for state, lands, ends, rest in told:
        state.landing, state.forced, state.expected = lands, ends, rest
        state.valued = True
        state.steered += 1


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


def _has_turn(state: RequestState) -> bool:
    """Whether this is the one of `every` tokens that is scored."""
    return state.generated % state.target.every == 0


def _undecided(candidates: Candidates, wanted: Tensor, states: Sequence[RequestState]) -> list[int]:
    """Rows whose next token is not too certain to be worth a value."""
    least = torch.tensor([state.target.min_entropy for state in states], dtype=torch.float64)
    open_rows = wanted.any(-1) & (candidates.entropy() >= least)
    rows: list[int] = open_rows.nonzero()[:, 0].tolist()
    return rows


def _pick(candidates: Candidates, rows: list[int]) -> Candidates:
    return Candidates(
        candidates.ids[rows],
        candidates.log_q[rows],
        candidates.log_p0[rows],
        candidates.log_rest[rows],
        candidates.own_end[rows],
    )

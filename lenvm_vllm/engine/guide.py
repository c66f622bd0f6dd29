"""From the logits of guided rows to their steered distribution: asks for values, then steers."""

import math
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lenvm_vllm.engine.closing import Closing
from lenvm_vllm.engine.goals import cut_of, goals_of, shares_of
from lenvm_vllm.engine.messages import NOBODY, Question
from lenvm_vllm.engine.pace import Pace
from lenvm_vllm.engine.sessions import Sessions
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.settings import Settings
from lenvm_vllm.steering.candidates import (
    Candidates,
    Cut,
    Writes,
    cut_candidates,
    eos_index,
    plan_writes,
)
from lenvm_vllm.steering.goals import Goals
from lenvm_vllm.steering.policies import expected_rest, steer
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.text.sentences import Sentences
from value_server.contract import wire


@dataclass(frozen=True)
class Step:
    """B rows of a step with their K candidates. scored, exactly: as of `Question`."""

    rows: list[int]
    states: list[RequestState]
    cuts: list[Cut]
    goals: Goals
    candidates: Candidates
    scored: Tensor
    exactly: Tensor

    def pick(self, keep: Tensor) -> "Step":
        """Those of its rows that `keep` (B,) bool marks."""
        if keep.all():
            return self
        at = keep.nonzero()[:, 0].tolist()
        return Step(
            [self.rows[i] for i in at],
            [self.states[i] for i in at],
            [self.cuts[i] for i in at],
            self.goals.pick(keep),
            self.candidates.pick(keep),
            self.scored[keep],
            self.exactly[keep],
        )


class Guide:
    """Steers the rows of one step by one question to the value server. A row that has no values in
    time is led by what its text shows: in its landing its sentences and then itself are ended."""

    def __init__(
        self,
        sessions: Sessions,
        settings: Settings,
        counters: Counters,
        sentences: Sentences | None = None,
    ) -> None:
        self.sessions = sessions
        self._settings = settings
        self._counters = counters
        self._closing = Closing(sentences, settings.max_kl)
        self._pace = Pace(settings.wait_share, settings.wait_floor_s, settings.timeout_s)

    def tell(self, states: Iterable[RequestState]) -> None:
        """As `Sessions.tell`."""
        self.sessions.tell(states, self._pace)

    def plan(self, logits: Tensor, states: dict[int, RequestState]) -> Writes | None:
        """How to change `logits` (batch, V) so that the rows in `states` are steered.

        None: change nothing.
        """
        turns = {row: s for row, s in states.items() if s.has_turn}
        info = self._model(turns.values()) if turns else NOBODY
        # Ids that the value model does not know are the padding of vLLM's vocabulary.
        logits = logits[:, : info.vocab_size]
        goals = goals_of(list(turns.values()), info.gamma, self._settings.max_kl)
        step = self._undecided(logits, turns, info, goals) if turns else None
        z = None
        if step is None:
            self.sessions.tell_closed()
            self._pace.asks()  # for nothing, but vLLM's step was one
            self._pace.goes_on()
        else:
            z = self._values(step, info)
        last = self._closing.behind_whole(turns, goals.landed, logits)
        plans = [self._end(last, turns, logits.shape[-1])] if last else []
        if step is not None and z is not None:
            plans += self._steer(step, z, last.keys(), logits.shape[-1])
        return Writes.together(plans) if plans else None

    def _model(self, states: Iterable[RequestState]) -> wire.ModelInfo:
        """The value model; where no text wants values no server is looked for."""
        if any(state.target.wants_values for state in states):
            return self.sessions.model(time.perf_counter() + self._pace.wait_s)
        return self.sessions.info

    def _undecided(
        self,
        logits: Tensor,
        turns: dict[int, RequestState],
        info: wire.ModelInfo,
        goals: Goals,
    ) -> Step | None:
        """The rows whose next token is not too certain; None: no row."""
        rows, asking = list(turns), list(turns.values())
        cuts = [cut_of(state, self._settings) for state in asking]
        candidates = cut_candidates(logits, cuts, self._settings.max_candidates, rows)
        candidates = self._closing.widened(candidates, logits, turns, goals.closing)
        scored = candidates.scored(*shares_of(asking, self._settings, info.max_candidates))
        exactly = (goals.landed >= 0) & (self._settings.scoring == "landing")
        undecided, least = scored.any(-1), [s.target.min_entropy for s in asking]
        if any(least):
            undecided &= candidates.entropy() >= torch.tensor(least, dtype=torch.float64)
        step = Step(rows, asking, cuts, goals, candidates, scored, exactly).pick(undecided)
        return step if step.rows else None

    def _values(self, step: Step, info: wire.ModelInfo) -> Tensor:
        """(B, K) value logits, NaN in rows that have none in time."""
        askable = self.sessions.askable(step.states, info)
        question = Question(askable, step.candidates.ids, step.scored, step.exactly)
        self._pace.asks()
        z = self.sessions.values(step.states, question, self._pace)
        self._pace.goes_on()
        known = (~z.isnan()).any(-1).tolist()
        for state, valued in zip(step.states, known, strict=True):
            state.valued = valued
        wanting = sum(state.target.wants_values for state in step.states)
        self._counters.add("rows", wanting)
        self._counters.add("valued_rows", sum(known))
        self._counters.add("fallback_steps", wanting > 0 and not any(known))
        return z

    def _steer(self, step: Step, z: Tensor, ended: Container[int], size: int) -> list[Writes]:
        """z: (B, K) value logits. ended: rows that are not steered any more. size: of the
        vocabulary."""
        known = (~z.isnan()).any(-1)
        goes_on = torch.tensor([row not in ended for row in step.rows])
        steered = (known | step.goals.lead_alone) & goes_on
        if not steered.any():
            return []
        step, z, known = step.pick(steered), z[steered], known[steered]
        goals, before = step.goals, step.candidates
        heeded = goals.without_values(~known).heeds_sentences
        heeded &= torch.tensor([state.is_known for state in step.states])
        closes = self._closing.among(before, step.states, heeded, goals.closing >= 0)
        log_q, log_p0 = steer(
            before.log_q, before.log_p0, before.own_end, z, closes, goals, before.own
        )
        rest = expected_rest(log_q, log_p0, z, goals.gamma).masked_fill(~known, torch.nan)
        told = zip(
            step.states,
            (goals.landed >= 0).tolist(),
            (log_p0 == 0).tolist(),
            rest.tolist(),
            strict=True,
        )
        for state, lands, ends, expected in told:
            state.landing, state.forced, state.expected = lands, ends, expected
            # V1 samples for a part of a prompt, too, and drops the token.
            if state.valued and state.steered_at != len(state.output_ids):
                state.steered, state.steered_at = state.steered + 1, len(state.output_ids)
        return [plan_writes(step.rows, step.cuts, before, log_q, log_p0, size)]

    def _end(
        self, last: dict[int, list[int]], states: dict[int, RequestState], size: int
    ) -> Writes:
        """Nothing but these tokens in these rows. size: of the vocabulary."""
        index, ids = eos_index(list(last.values()), size)
        for row, tokens in last.items():
            state, ends = states[row], tokens != self._closing.lines
            state.landing, state.forced = True, ends
            state.expected = 0.0 if ends else math.nan
        rows = torch.tensor(list(last))[index]
        return Writes(rows, ids, torch.zeros(len(rows), dtype=torch.float64))

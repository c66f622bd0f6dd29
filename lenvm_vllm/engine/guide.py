"""From the logits of guided rows to their steered distribution: asks for values, then steers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lenvm_vllm.engine.sessions import Sessions
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.settings import Settings
from lenvm_vllm.steering.candidates import Candidates, Cut, Writes, cut_candidates, plan_writes
from lenvm_vllm.steering.landing import Landing, landing_of
from lenvm_vllm.steering.policies import Goals, expected_rest, steer
from lenvm_vllm.text.sentences import Sentences
from value_server.contract import wire
from value_server.contract.values import remaining_goal


@dataclass(frozen=True)
class Step:
    """B rows of a step with their K candidates. wanted: (B, K) bool, those that are scored."""

    rows: list[int]
    states: list[RequestState]
    cuts: list[Cut]
    candidates: Candidates
    wanted: Tensor

    def pick(self, keep: Tensor) -> "Step":
        """Those of its rows that `keep` (B,) bool marks."""
        at = keep.nonzero()[:, 0].tolist()
        return Step(
            [self.rows[i] for i in at],
            [self.states[i] for i in at],
            [self.cuts[i] for i in at],
            self.candidates.pick(keep),
            self.wanted[keep],
        )


class Guide:
    """Steers the rows of one step with one call to the value server."""

    def __init__(
        self, sessions: Sessions, settings: Settings, sentences: Sentences | None = None
    ) -> None:
        self.sessions = sessions
        self._settings = settings
        self._sentences = sentences
        self._closing_ids = torch.tensor(sentences.ids if sentences else [], dtype=torch.long)

    def plan(self, logits: Tensor, states: dict[int, RequestState]) -> Writes | None:
        """How to change `logits` (batch, V) so that the rows in `states` are steered.

        None: change nothing. Raises ValueServerError.
        """
        if not states and not self.sessions.has_closed:
            return None
        info = self.sessions.model()
        # Ids that the value model does not know are the padding of vLLM's vocabulary.
        logits = logits[:, : info.vocab_size]
        step = self._worth_asking(logits, states, info)
        if step is None:
            self.sessions.tell_closed()
            return None
        for state in step.states:
            state.valued = False  # until they are there
        z = self.sessions.values(step.states, step.candidates.ids, step.wanted)
        known = ~(z.isnan() & step.wanted).any(-1)
        if not known.any():
            return None
        return self._steer(step.pick(known), z[known], info.gamma, logits.shape[-1])

    def _worth_asking(
        self, logits: Tensor, states: dict[int, RequestState], info: wire.ModelInfo
    ) -> Step | None:
        """The rows that have their turn and whose next token is not too certain; None: no row."""
        turns = {row: s for row, s in states.items() if s.generated % s.target.every == 0}
        rows = self.sessions.askable(turns, info)
        if not rows:
            return None
        asking = [states[row] for row in rows]
        cuts = [cut_of(state, self._settings) for state in asking]
        width = min(self._settings.max_candidates, info.max_candidates)
        candidates = cut_candidates(logits[rows], cuts, width)
        wanted = candidates.scored(*shares_of(asking, self._settings))
        least = torch.tensor([s.target.min_entropy for s in asking], dtype=torch.float64)
        undecided = wanted.any(-1) & (candidates.entropy() >= least)
        step = Step(rows, asking, cuts, candidates, wanted).pick(undecided)
        return step if step.rows else None

    def _steer(self, step: Step, z: Tensor, gamma: float, size: int) -> Writes:
        """z: (B, K) value logits. size: of the vocabulary."""
        goals = goals_of(step.states, gamma, self._settings.max_kl)
        closes = self._closes(step, goals)
        before = step.candidates
        log_q, log_p0 = steer(before.log_q, before.log_p0, before.own_end, z, closes, goals)
        rest = expected_rest(log_q, log_p0, z, gamma)
        told = zip(
            step.states,
            (goals.landed >= 0).tolist(),
            (log_p0 == 0).tolist(),
            rest.tolist(),
            strict=True,
        )
        for state, lands, ends, expected in told:
            state.landing, state.forced, state.expected = lands, ends, expected
            state.valued = True
            state.steered += 1
        return plan_writes(step.rows, step.cuts, before, log_q, log_p0, size)

    def _closes(self, step: Step, goals: Goals) -> Tensor:
        """(B, K) bool: candidates that end a sentence, of texts that are led to the end of one."""
        ids = step.candidates.ids
        closes = torch.isin(ids, self._closing_ids) & step.candidates.kept
        closes &= goals.heeds_sentences[:, None]
        for row, place in closes.nonzero().tolist():
            assert self._sentences is not None
            text = step.states[row].output_ids
            closes[row, place] = self._sentences.ends(text, int(ids[row, place]))
        return closes


def cut_of(state: RequestState, settings: Settings) -> Cut:
    """The candidate cut of a request: its own, or the plugin's where it sets none."""
    own, min_p = state.own, state.own.min_p
    top_k, top_p = own.top_k, own.top_p
    end_top_k, end_top_p = 0, 0.0
    if state.target.mode == "tilt":
        unset = not top_k and top_p >= 1 and not min_p
        min_p = settings.tilt_min_p if unset else min_p
    else:
        top_k = top_k or settings.top_k
        top_p = top_p if top_p < 1 else settings.top_p
        end_top_k, end_top_p = max(top_k, settings.top_k), max(top_p, settings.top_p)
    # A greedy request is steered at T = 1; vLLM then takes the most probable token.
    temperature = state.temperature or 1.0
    return Cut(temperature, top_k, top_p, min_p, state.ends, end_top_k, end_top_p)


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
    known = [(aim, state.generated) for aim, state in zip(aims, states, strict=True)]
    landings = [landing_of(a.mode, remaining_goal(a.high, n), a.width) for a, n in known]
    return Goals(
        exact=torch.tensor([aim.mode == "equal_to" for aim in aims]),
        tilts=torch.tensor([aim.mode == "tilt" for aim in aims]),
        greedy=torch.tensor([target.policy == "greedy" for target in targets]),
        lowest=column([remaining_goal(aim.fewest, n) for aim, n in known]),
        landing=Landing(
            column([landing.target for landing in landings]),
            column([landing.before for landing in landings]),
            column([landing.behind for landing in landings]),
        ),
        beta=column([target.beta or 0.0 for target in targets]),
        max_kl=column([max_kl if t.max_kl is None else t.max_kl for t in targets]),
        gamma=gamma,
    )

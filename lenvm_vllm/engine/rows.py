"""What one engine step does to its guided rows, whichever model runner calls."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor

from lenvm_vllm.engine import ranks, telling
from lenvm_vllm.engine.enforce import enforce_inplace
from lenvm_vllm.engine.guide import Guide
from lenvm_vllm.engine.plans import Plans
from lenvm_vllm.engine.sessions import Sessions
from lenvm_vllm.engine.state import RequestState, media_of, session_of
from lenvm_vllm.host.media import placeholder_ids
from lenvm_vllm.host.sampling import OwnSampling
from lenvm_vllm.settings import load_settings
from lenvm_vllm.steering.candidates import Writes
from lenvm_vllm.target.admission import check_engine, markers_of, resolved
from lenvm_vllm.target.request import ADAPTER, HAS_CALLS, LengthTarget, LengthTargetError
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.telemetry.progress import KEY, Progress
from lenvm_vllm.text.letters import Letters
from lenvm_vllm.text.tokenizer import tokenizer_of
from lenvm_vllm.values.replicas import Replicas, connect
from value_server.contract.checkpoint import tokenizer_fingerprint
from value_server.contract.units import UNITS

logger = logging.getLogger("vllm.lenvm")

Rows = dict[int, RequestState]  # row of the logits → its request


class EngineRows:
    """Steers rows of logits; each model runner's adapter says which request a row belongs to."""

    def __init__(self, vllm_config: Any, client: Replicas | None = None) -> None:
        """Connects to nothing; the first request with a target does."""
        # Not with this file: vLLM's front end loads the class while it hides the GPU from what is
        # loaded, and the sampling functions bring much of vLLM along. Here a name that is missing
        # still keeps the engine from starting.
        from lenvm_vllm.host import own_cut

        self._own_cut = own_cut
        settings = load_settings(vllm_config.additional_config)
        tokenizer = tokenizer_of(vllm_config)
        self._config = vllm_config
        self._markers = markers_of(vllm_config, settings, tokenizer)
        self._letters = Letters(tokenizer, self._markers)
        self._placeholders = placeholder_ids(getattr(vllm_config.model_config, "hf_config", None))
        self._counters = Counters()
        self._progress = Progress()
        self._client = client or connect(settings)
        self._sessions = Sessions(
            self._client,
            cache(lambda: None if tokenizer is None else tokenizer_fingerprint(tokenizer)),
            self._counters,
        )
        guide = Guide(self._sessions, settings, self._counters, self._letters.sentences)
        self._plans = Plans(guide, self._counters)

    def open(
        self, params: Any, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> RequestState | None:
        """A request by its SamplingParams; None where it asks for no length."""
        if (target := self._target_of(params)) is None:
            return None
        calls = bool(params.extra_args.get(HAS_CALLS))
        counter = self._letters.counter(target.unit, not params.skip_special_tokens, calls)
        if counter is None and target.unit != UNITS[0]:
            logger.error(
                "this tokenizer does not tell %s; the request runs without a length target",
                target.unit,
            )
            return None
        # Where no calls are taken out of the text, what looks like one counts.
        text_only = counter is not None and not calls
        if leads := ranks.leads():
            self._counters.add("requests")
        session = session_of(params.extra_args)
        self._client.assign(session, str(params.extra_args.get(ADAPTER, "")))
        return RequestState(
            session=session,
            target=target,
            prompt_ids=prompt_ids,
            output_ids=output_ids,
            eos_ids=sorted(params.all_stop_token_ids),
            markers=replace(self._markers, calls={}) if text_only else self._markers,
            counter=counter,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            own=OwnSampling.of(params),
            has_grammar=params.structured_outputs is not None,
            media=media_of(params.extra_args),
            placeholders=self._placeholders,
            row=self._progress.open(params.extra_args.get(KEY)) if leads else None,
        )

    def _target_of(self, params: Any) -> LengthTarget | None:
        """What a request asks for; a wrong wish, of a front end that does not validate, is none:
        the engine must not fall for it."""
        try:
            if (target := LengthTarget.from_extra_args(params.extra_args)) is None:
                return None
            check_engine(self._config)
            return resolved(target, self._config)
        except LengthTargetError as error:
            logger.error("%s; the request goes on without a length target", error)
            return None

    def close(self, state: RequestState | None) -> None:
        """This request is over."""
        if state is None:
            return
        state.renew()
        self._sessions.close(state)
        self._progress.close(state.row)
        if ranks.leads():
            self._count(state)

    @property
    def looks_ahead(self) -> bool:
        """Whether this rank asks a value server that tells what comes after any next token."""
        return ranks.leads() and self._sessions.any_looks_ahead

    def tell(self, states: Iterable[RequestState]) -> None:
        """Before vLLM's own forward pass: what of these texts the value server can begin with."""
        if ranks.leads():
            self._plans.tell(_renewed(states))

    def _count(self, state: RequestState) -> None:
        """How a request ended, for the metrics."""
        if state.gave_way:
            self._counters.add("gave_way")
        if (outcome := state.outcome()) is not None:
            amount, wanted = outcome
            off = abs(amount - wanted)
            self._counters.add("finished")
            self._counters.add("deviation_tokens", off if state.counter is None else 0)
            self._counters.add("deviation_ratio", off / max(1, wanted))

    def steer_inplace(self, logits: Tensor, states: Rows) -> None:
        """logits: (batch, V) float32. Other rows stay as they are."""
        if not states:
            return
        _renewed(states.values())
        self._penalise_inplace(logits, states)
        # vLLM may run a text that has ended for a step more, of which there is nothing to tell.
        told = {row: s for row, s in states.items() if s.row is not None and s.counts}
        told = {row: s for row, s in told.items() if not s.is_over}
        p_end = telling.end_probabilities(logits, told)
        forced = enforce_inplace(logits, states, self._letters)
        free = {row: s for row, s in states.items() if row not in forced}
        writes = self._plan(logits, free) if any(s.counts for s in states.values()) else None
        if writes is not None:
            writes.apply_inplace(logits)
            steered = set(writes.rows.tolist())
            free = {row: s for row, s in free.items() if row not in steered}
        self._cut_inplace(logits, free)
        ended = {row for row, tokens in forced.items() if tokens == states[row].proper_ends}
        telling.tell(self._progress, told, ended, p_end)

    def _plan(self, logits: Tensor, free: Rows) -> Writes | None:
        """One rank asks and all do the same, so that all sample the same token."""
        steered = {row: s for row, s in free.items() if s.is_steered}
        return ranks.made_once(lambda: self._plans.plan(logits, steered))

    def _penalise_inplace(self, logits: Tensor, states: Rows) -> None:
        """The penalties that vLLM leaves to the plugin."""
        asked = {row: s for row, s in states.items() if s.own.penalises}
        texts = [(s.prompt_ids or [], s.output_ids) for s in asked.values()]
        self._own_cut.penalise_inplace(logits, list(asked), texts, [s.own for s in asked.values()])

    def _cut_inplace(self, logits: Tensor, states: Rows) -> None:
        """The cut of rows that were not steered, and so not cut, in this step."""
        asked = {row: s for row, s in states.items() if s.own.cuts}
        temperatures = [s.temperature for s in asked.values()]
        self._own_cut.cut_inplace(
            logits, list(asked), temperatures, [s.own for s in asked.values()]
        )


def _renewed(states: Iterable[RequestState]) -> list[RequestState]:
    """With the tokens that have come: what a part of the step finds stays for the others."""
    known = list(states)
    for state in known:
        state.renew()
    return known

"""What one engine step does to its guided rows, whichever model runner calls.

The engine must never fall for a length: whatever goes wrong with the values, the step goes on
with the model's own distribution inside the guard rails, and the log says so once.
"""

import logging
import math
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lenvm_vllm.engine.enforce import enforce_inplace
from lenvm_vllm.engine.guide import Client, Guide
from lenvm_vllm.engine.state import RequestState, session_of
from lenvm_vllm.host.names import (
    get_pp_group,
    get_tp_group,
    model_parallel_is_initialized,
)
from lenvm_vllm.host.sampling import OwnSampling
from lenvm_vllm.host.sampling_ops import cut_inplace, penalise_inplace
from lenvm_vllm.settings import load_settings
from lenvm_vllm.steering.candidates import Writes, eos_index
from lenvm_vllm.target.admission import markers_of, resolved
from lenvm_vllm.target.request import HAS_CALLS, LengthTarget, LengthTargetError
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.telemetry.progress import FORCED, GAVE_WAY, KEY, LANDING, VALUED, Progress
from lenvm_vllm.text.letters import Letters
from lenvm_vllm.text.tokenizer import tokenizer_of
from lenvm_vllm.values.client import CircuitOpen, ValueServerError
from lenvm_vllm.values.replicas import connect
from value_server.contract.checkpoint import tokenizer_fingerprint
from value_server.contract.units import UNITS

logger = logging.getLogger("vllm.lenvm")


class EngineRows:
    """Steers rows of logits; each model runner's adapter says which request a row belongs to."""

    def __init__(self, vllm_config: Any, client: Client | None = None) -> None:
        """Connects to nothing; the first request with a target does."""
        settings = load_settings(vllm_config.additional_config)
        client = client or connect(settings)
        tokenizer = tokenizer_of(vllm_config)
        self._config = vllm_config
        self._markers = markers_of(vllm_config, settings, tokenizer)
        self._letters = Letters(tokenizer, self._markers)
        self._guide = Guide(
            client,
            settings,
            lambda: None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            self._letters.sentences,
        )
        # Where each rank samples requests of its own, each asks for its own.
        self._ranks_share_rows = not vllm_config.parallel_config.enable_batch_sharded_sampling
        self._trouble: str | None = None
        self._told: set[str] = set()
        self._counters = Counters()
        self._progress = Progress()

    def open(
        self, params: Any, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> RequestState | None:
        """A request by its SamplingParams; None where it asks for no length."""
        try:
            target = LengthTarget.from_extra_args(params.extra_args)
            target = target and resolved(target, self._config)
        except LengthTargetError as error:  # from a front end that does not validate
            logger.error("%s; the request goes on without a length target", error)
            return None
        if target is None:
            return None
        calls, markers = bool(params.extra_args.get(HAS_CALLS)), self._markers
        counter = self._letters.counter(target.unit, not params.skip_special_tokens, calls)
        if counter is not None and not calls:
            markers = replace(markers, calls={})  # what looks like one is text
        if counter is None and target.unit != UNITS[0]:
            logger.error("no %s are known; the request goes on without a length", target.unit)
            return None
        if _leads():
            self._counters.add("requests")
        return RequestState(
            session=session_of(params.extra_args),
            target=target,
            prompt_ids=prompt_ids,
            output_ids=output_ids,
            eos_ids=sorted(params.all_stop_token_ids),
            markers=markers,
            counter=counter,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            own=OwnSampling.of(params),
            row=self._progress.open(params.extra_args.get(KEY)) if _leads() else None,
        )

    def close(self, state: RequestState | None) -> None:
        """This request is over."""
        if state is None:
            return
        self._guide.close(state)
        self._progress.close(state.row)
        if state.gave_way and _leads():
            self._counters.add("gave_way")
        if (outcome := state.outcome()) is not None and _leads():
            amount, wanted = outcome
            off = abs(amount - wanted)
            self._counters.add("finished")
            self._counters.add("deviation_tokens", off if state.counter is None else 0)
            self._counters.add("deviation_ratio", off / max(1, wanted))

    def steer_inplace(self, logits: Tensor, states: dict[int, RequestState]) -> None:
        """logits: (batch, V) float32; states: row → request. Other rows stay as they are."""
        if not states:
            return
        _penalise_inplace(logits, states)
        told = {row: s for row, s in states.items() if s.row is not None and s.counts}
        p_end = _end_probabilities(logits, told)
        forced = enforce_inplace(logits, states, self._letters)
        free = {row: s for row, s in states.items() if row not in forced and s.is_steered}
        ended = {row for row, tokens in forced.items() if tokens == states[row].proper_ends}
        counting = any(s.counts for s in states.values())
        writes = self._shared_plan(logits, free) if counting else None
        steered = set() if writes is None else set(writes.rows.tolist())
        if writes is not None:
            writes.apply_inplace(logits)
        _cut_inplace(
            logits, {row: s for row, s in states.items() if row not in forced.keys() | steered}
        )
        self._tell(told, ended, p_end)

    def _tell(self, told: dict[int, RequestState], ended: set[int], p_end: list[float]) -> None:
        """What happened in this step, for the API server. ended: rows that a rail ends."""
        states, forced = list(told.values()), [s.forced or row in ended for row, s in told.items()]
        for state in states:
            state.steps += 1
        self._progress.tell(
            rows=[s.row for s in states if s.row is not None],
            index=[len(s.output_ids) for s in states],
            counted=[s.generated + 1 for s in states],
            token=[s.output_ids[-1] if s.output_ids else -1 for s in states],
            p_end=p_end,
            expected=[0.0 if f else s.expected for s, f in zip(states, forced, strict=True)],
            flags=[
                FORCED * f | LANDING * s.landing | VALUED * s.valued | GAVE_WAY * s.gave_way
                for s, f in zip(states, forced, strict=True)
            ],
            steps=[s.steps for s in states],
            steered=[s.steered for s in states],
        )

    def _shared_plan(self, logits: Tensor, states: dict[int, RequestState]) -> Writes | None:
        """One rank asks and all do the same, so that all sample the same token."""
        group = get_tp_group() if model_parallel_is_initialized() else None
        if group is None or group.world_size == 1 or not self._ranks_share_rows:
            return self._plan(logits, states)
        mine = self._plan(logits, states) if group.rank_in_group == 0 else None
        return group.broadcast_object(mine, src=0)

    def _plan(self, logits: Tensor, states: dict[int, RequestState]) -> Writes | None:
        """The plan of a step, None where there is none; its time and its failures are counted."""
        started, waited_s = time.perf_counter(), self._guide.waited_s
        left_out = Counter(self._guide.left_out)
        try:
            return self._plan_or_go_on(logits, states)
        finally:
            self._note_left_out(self._guide.left_out - left_out)
            self._counters.add("steps")
            self._counters.add("plan_seconds", time.perf_counter() - started)
            self._counters.add("value_seconds", self._guide.waited_s - waited_s)

    def _plan_or_go_on(self, logits: Tensor, states: dict[int, RequestState]) -> Writes | None:
        """The one place that decides to go on without values."""
        try:
            writes = self._guide.plan(logits, states)
        except Exception as error:
            self._counters.add("fallback_steps")
            for state in states.values():
                state.valued = False
            if not isinstance(error, CircuitOpen):
                ours = isinstance(error, ValueServerError)
                self._report(f"{type(error).__name__}: {error}", traceback=not ours)
            return None
        if writes is not None:  # None: nothing was asked, so nothing is known
            self._report(None)
        return writes

    def _note_left_out(self, rows: Counter[str]) -> None:
        """Rows that had no values though the server was there, by why; each is logged once."""
        self._counters.add("unguided_rows", rows.total())
        for reason in sorted(rows.keys() - self._told):
            logger.warning("length targets: %s; such texts have guard rails only", reason)
            self._told.add(reason)

    def _report(self, trouble: str | None, traceback: bool = False) -> None:
        """Log a change between steered and not; later failures of one outage are silent."""
        if trouble is not None and self._trouble is None:
            logger.error(
                "length targets: no values (%s); requests go on with guard rails only",
                trouble,
                exc_info=traceback,
            )
        if trouble is None and self._trouble is not None:
            logger.info("length targets: the value server is back, requests are steered again")
        self._trouble = trouble


def _leads() -> bool:
    """Whether this rank speaks for all that run the same requests."""
    if not model_parallel_is_initialized():
        return True
    return bool(get_tp_group().rank_in_group == 0 and get_pp_group().is_last_rank)


def _end_probabilities(logits: Tensor, states: dict[int, RequestState]) -> list[float]:
    """The unguided model's probability of the end in each row, NaN where no end is allowed.

    logits: (batch, V), not changed.
    """
    rows = [row for row, s in states.items() if not s.held]
    if not rows:
        return [math.nan] * len(states)
    index, ids = eos_index([states[row].ends for row in rows], logits.shape[-1])
    own = logits[rows]  # (B, V)
    log_p = own[index.to(own.device), ids.to(own.device)].double()
    log_p -= own.logsumexp(-1).double()[index.to(own.device)]
    known = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, index, log_p.exp().cpu())
    found = dict(zip(rows, known.tolist(), strict=True))
    return [found.get(row, math.nan) for row in states]


def _penalise_inplace(logits: Tensor, states: dict[int, RequestState]) -> None:
    """The penalties that vLLM leaves to the plugin."""
    rows = [row for row, s in states.items() if s.own.penalises]
    if rows:
        asked = [states[row] for row in rows]
        texts = [(s.prompt_ids or [], s.output_ids) for s in asked]
        penalise_inplace(logits, rows, texts, [s.own for s in asked])


def _cut_inplace(logits: Tensor, states: dict[int, RequestState]) -> None:
    """The cut of rows that were not steered, and so not cut, in this step."""
    rows = [row for row, s in states.items() if s.own.cuts]
    if rows:
        asked = [states[row] for row in rows]
        cut_inplace(logits, rows, [s.temperature for s in asked], [s.own for s in asked])

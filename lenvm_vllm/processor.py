"""The logits processor that vLLM loads.

The engine must never fall for a length: whatever goes wrong with the values, the step goes on
with the model's own distribution inside the guard rails, and the log says so once.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group, model_parallel_is_initialized
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from lenvm_vllm.candidates import Writes, eos_index
from lenvm_vllm.client import CircuitOpen, ValueClient, ValueServerError
from lenvm_vllm.guide import Client, Guide
from lenvm_vllm.rails import check_limits, rails_of
from lenvm_vllm.request import LengthTarget
from lenvm_vllm.settings import load_settings
from lenvm_vllm.state import RequestState
from value_server.contract.checkpoint import tokenizer_fingerprint

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.lenvm")


class LenvmLogitsProcessor(LogitsProcessor):
    """Steers requests with a length target; leaves all other rows as they are, to the bit."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError, which vLLM answers with HTTP 400."""
        target = LengthTarget.from_extra_args(sampling_params.extra_args)
        if target is not None:
            check_limits(
                rails_of(target),
                sampling_params.max_tokens,
                sampling_params.min_tokens,
                sampling_params.ignore_eos,
            )

    def __init__(
        self,
        vllm_config: "VllmConfig",
        device: torch.device,
        is_pin_memory: bool,
        client: Client | None = None,
    ) -> None:
        """Connects to nothing; the first request with a target does."""
        settings = load_settings(vllm_config.additional_config)
        client = client or ValueClient(
            settings.url, token=settings.token, timeout_s=settings.timeout_s
        )
        self._guide = Guide(client, settings, lambda: _fingerprint(vllm_config))
        self._states: dict[int, RequestState] = {}
        self._trouble: str | None = None

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch: removed, then added (also on an occupied index), then moved."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._forget(index)
        for index, params, prompt_ids, output_ids in batch_update.added:
            self._forget(index)
            if (state := _state_of(params, prompt_ids, output_ids)) is not None:
                self._states[index] = state
        for source, destination, direction in batch_update.moved:
            moved, displaced = self._states.pop(source, None), self._states.pop(destination, None)
            if moved is not None:
                self._states[destination] = moved
            if displaced is not None and direction == MoveDirectionality.SWAP:
                self._states[source] = displaced
            elif displaced is not None:
                self._guide.close(displaced)

    def apply(self, logits: Tensor) -> Tensor:
        """logits: (batch, V) float32, changed in place."""
        if not self._states:
            return logits
        self._apply_rails_inplace(logits)
        free = {row: s for row, s in self._states.items() if not s.rails.forces(s.generated)}
        if (writes := self._shared_plan(logits, free)) is not None:
            writes.apply_inplace(logits)
        return logits

    def _forget(self, index: int) -> None:
        if (state := self._states.pop(index, None)) is not None:
            self._guide.close(state)

    def _shared_plan(self, logits: Tensor, states: dict[int, RequestState]) -> Writes | None:
        """One rank asks and all do the same, so that all sample the same token."""
        group = get_tp_group() if model_parallel_is_initialized() else None
        if group is None or group.world_size == 1:
            return self._plan(logits, states)
        mine = self._plan(logits, states) if group.rank_in_group == 0 else None
        return group.broadcast_object(mine, src=0)

    def _plan(self, logits: Tensor, states: dict[int, RequestState]) -> Writes | None:
        """The one place that decides to go on without values."""
        try:
            writes = self._guide.plan(logits, states)
        except CircuitOpen:
            return None
        except ValueServerError as error:
            self._report(f"{type(error).__name__}: {error}")
            return None
        except Exception as error:
            self._report(f"{type(error).__name__}: {error}", traceback=True)
            return None
        if writes is not None:  # None: nothing was asked, so nothing is known
            self._report(None)
        return writes

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

    def _apply_rails_inplace(self, logits: Tensor) -> None:
        """Suppress or force the end of each row as its rails say.

        A token at -inf (grammar, allowed tokens) stays there, and a row is never emptied.
        """
        states = self._states.items()
        early = [row for row, s in states if s.rails.suppresses(s.generated)]
        due = [row for row, s in states if s.rails.forces(s.generated)]
        for rows, force in ((early, False), (due, True)):
            if not rows:
                continue
            row_index, ids = eos_index([self._states[r].eos_ids for r in rows], logits.shape[-1])
            row_index, ids = row_index.to(logits.device), ids.to(logits.device)
            own = logits[rows]  # a copy
            railed = torch.full_like(own, -torch.inf) if force else own.clone()
            railed[row_index, ids] = own[row_index, ids] if force else -torch.inf
            empty = railed.isneginf().all(-1, keepdim=True)
            logits[rows] = torch.where(empty, own, railed)


def _state_of(
    params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
) -> RequestState | None:
    target = LengthTarget.from_extra_args(params.extra_args)
    if target is None:
        return None
    return RequestState(
        target=target,
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        eos_ids=sorted(params.all_stop_token_ids),
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
    )


def _fingerprint(vllm_config: Any) -> str | None:
    """Of the tokenizer that vLLM serves; None when it serves none."""
    from vllm.tokenizers import cached_tokenizer_from_config

    if vllm_config.model_config.skip_tokenizer_init:
        return None
    return tokenizer_fingerprint(cached_tokenizer_from_config(vllm_config.model_config))

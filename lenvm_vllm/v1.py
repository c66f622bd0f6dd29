"""Model Runner V1: rows are told as changes of the batch, tokens as live lists."""

from typing import Any

from torch import Tensor

from lenvm_vllm.engine_rows import EngineRows
from lenvm_vllm.guide import Client
from lenvm_vllm.state import RequestState
from lenvm_vllm.vllm_names import MoveDirectionality, V1LogitsProcessor


class V1Processor(V1LogitsProcessor):
    def __init__(
        self, vllm_config: Any, device: Any, is_pin_memory: bool, client: Client | None = None
    ) -> None:
        self._rows = EngineRows(vllm_config, client)
        self._states: dict[int, RequestState] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the batch: removed, then added (also on an occupied index), then moved."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.close(self._states.pop(index, None))
        for index, params, prompt_ids, output_ids in batch_update.added:
            self._rows.close(self._states.pop(index, None))
            if (state := self._rows.open(params, prompt_ids, output_ids)) is not None:
                self._states[index] = state
        for source, destination, direction in batch_update.moved:
            moved, displaced = self._states.pop(source, None), self._states.pop(destination, None)
            if moved is not None:
                self._states[destination] = moved
            if direction == MoveDirectionality.SWAP and displaced is not None:
                self._states[source] = displaced
            else:
                self._rows.close(displaced)

    def apply(self, logits: Tensor) -> Tensor:
        """logits: (batch, V) float32, changed in place."""
        self._rows.steer_inplace(logits, self._states)
        return logits

"""Model Runner V1: rows are told as changes of the batch, tokens as live lists."""

from typing import Any

from torch import Tensor

from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.host.names import MoveDirectionality

# Steps that an unscheduled request is waited for, of each pipeline stage.
_AWAY = 8


class V1Batch:
    def __init__(self, rows: EngineRows, stages: int) -> None:
        """stages: of the pipeline."""
        self.rows = rows
        self._states: dict[int, RequestState] = {}
        self._patience = _AWAY * stages if stages > 1 else 0
        self._step = 0
        # Requests that are away, each known by its list of tokens, and the step they left at.
        self._away: dict[int, tuple[RequestState, int]] = {}

    def update(self, batch_update: Any) -> None:
        """Follow the batch, before vLLM's forward pass."""
        self._follow(batch_update)
        self.rows.tell(self._states.values())

    def _follow(self, batch_update: Any) -> None:
        """Removed, then added (also on an occupied index), then moved."""
        self._step += 1
        self._forget()
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._leave(self._states.pop(index, None))
        for index, params, prompt_ids, output_ids in batch_update.added:
            self._leave(self._states.pop(index, None))
            state, _ = self._away.pop(id(output_ids), (None, 0))
            if state is None:
                state = self.rows.open(params, prompt_ids, output_ids)
            if state is not None:
                self._states[index] = state
        for source, destination, direction in batch_update.moved:
            moved, displaced = self._states.pop(source, None), self._states.pop(destination, None)
            if moved is not None:
                self._states[destination] = moved
            if direction == MoveDirectionality.SWAP and displaced is not None:
                self._states[source] = displaced
            else:
                self._leave(displaced)

    def _leave(self, state: RequestState | None) -> None:
        """A request left the batch: it is over, or, with a pipeline, has no turn in this step.

        vLLM does not tell which; one that comes back comes with the same list of tokens.
        """
        if state is None or self._patience == 0 or state.is_over:
            self.rows.close(state)
        else:
            self._away[id(state.output_ids)] = state, self._step

    def _forget(self) -> None:
        """Close those that have been away for too long."""
        late = [key for key, (_, at) in self._away.items() if self._step - at > self._patience]
        for key in late:
            self.rows.close(self._away.pop(key)[0])

    def steer_inplace(self, logits: Tensor) -> None:
        """logits: (batch, V) float32."""
        self.rows.steer_inplace(logits, self._states)

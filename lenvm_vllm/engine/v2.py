"""Model Runner V2: requests live in slots, rows come in any order, tokens stand on the device.

vLLM does not tell that a request ended: its slot goes to another one. Until then its session
stays with the value server, which lets idle ones go first.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.steering.devices import Fetched, uploaded

# Tokens of a text that are fetched ahead of a step. One is usual; the step reads what is left.
NEWEST = 4


class V2Slots:
    def __init__(self, rows: EngineRows, req_states: Any) -> None:
        """req_states: vLLM's buffers, by slot; read only."""
        self.rows = rows
        self._slots = req_states
        self._states: dict[int, RequestState] = {}
        self._running: set[int] = set()  # slots of the last step, if it steered
        self._new: set[int] = set()  # of requests that had none yet
        # On their way to the host: of each text, how many tokens are new, and NEWEST of them.
        self._coming: tuple[list[RequestState], Fetched] | None = None

    def add(self, req_idx: int, sampling_params: Any) -> bool:
        """Whether this request is guided. The slot may still hold one that has ended."""
        if req_idx in self._states:
            # The token after which no step asked for more; it stands until the slot is written.
            self._fetch_newest([req_idx])
            self._take_newest()
            self.rows.close(self._states.pop(req_idx))
        if (state := self.rows.open(sampling_params, [], [])) is not None:
            self._states[req_idx] = state
            self._new.add(req_idx)
        return state is not None

    def tell(self) -> None:
        """Before vLLM's forward pass. What the device has of new requests is read, which takes no
        longer than the sampling of the step before: its logits were waited for. Of the others the
        newest token is fetched, and waited for if the value server can tell what comes after."""
        new = [slot for slot in self._new if slot in self._states]
        if new:
            self._read_tokens([(slot, int(self._slots.prefill_len.np[slot])) for slot in new])
        # Used once: a step without guided rows does not steer, so does not say who runs.
        running, self._running = self._running & self._states.keys(), set()
        self._fetch_newest(sorted(running))
        if self.rows.looks_ahead:
            self._take_newest()
        states = (self._states[slot] for slot in sorted(running.union(new)))
        self.rows.tell(state for state in states if not state.is_over)

    def steer_inplace(self, logits: Tensor, ctx: Any) -> None:
        """logits: (rows, V) float32, one row a request. ctx: vLLM's LogitsContext."""
        # The host knows how long a text is before the device has its last token. A prompt of
        # which only a part is computed has a row, too, but no token comes of it.
        self._take_newest()
        self._running, self._new = set(ctx.idx_mapping_np.tolist()), set()
        batch = zip(ctx.idx_mapping_np.tolist(), ctx.seq_lens_upper_bound_np.tolist(), strict=False)
        lengths = {
            row: (slot, length)
            for row, (slot, length) in enumerate(batch)
            if slot in self._states and length >= self._slots.prefill_len.np[slot]
        }
        self._read_tokens(list(lengths.values()))
        states = {row: self._states[slot] for row, (slot, _) in lengths.items()}
        self.rows.steer_inplace(logits, states)

    def _read_tokens(self, texts: list[tuple[int, int]]) -> None:
        """Bring the states of (slot, length) up to date, by one copy from the device."""
        news = [(slot, range(self._states[slot].length, length)) for slot, length in texts]
        index = [(slot, position) for slot, new in news for position in new]
        tokens = self._gather(np.array(index, dtype=np.int64).reshape(-1, 2))
        for slot, new in news:
            state, prompt_len = self._states[slot], int(self._slots.prompt_len.np[slot])
            own = [next(tokens) for _ in new]
            split = max(0, prompt_len - new.start)
            assert state.prompt_ids is not None
            state.prompt_ids += own[:split]
            state.output_ids += own[split:]

    def _fetch_newest(self, slots: list[int]) -> None:
        """Begin to fetch what the device has of these texts and their states have not."""
        self._take_newest()
        slots = [slot for slot in slots if self._states[slot].length]
        if not slots:
            return
        states = [self._states[slot] for slot in slots]
        texts, lengths = self._slots.all_token_ids.gpu, self._slots.total_len.gpu
        known = [state.length for state in states]
        slot, have = uploaded(
            texts.device, torch.tensor(slots)[:, None], torch.tensor(known)[:, None]
        )
        places = have + torch.arange(NEWEST, device=texts.device)
        newest = texts[slot, places.clamp(max=texts.shape[1] - 1)]
        self._coming = states, Fetched(torch.cat([lengths[slot] - have, newest], 1))

    def _take_newest(self) -> None:
        """Wait for what is being fetched, and bring it into the states."""
        if self._coming is None:
            return
        (states, news), self._coming = self._coming, None
        for state, (new, *tokens) in zip(states, news.here().tolist(), strict=True):
            state.output_ids += tokens[: max(0, new)]

    def _gather(self, index: NDArray[np.int64]) -> Any:
        """Iterator over the tokens at (slot, position)."""
        if not len(index):
            return iter(())
        texts = self._slots.all_token_ids.gpu
        (at,) = uploaded(texts.device, torch.from_numpy(index))
        return iter(Fetched(texts[at[:, 0], at[:, 1]]).here().tolist())

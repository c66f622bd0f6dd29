"""Model Runner V2: vLLM's own loader and interface, with a batch made by hand on the CPU.

Its kernels need Triton; its interface and its loader do not, so what is made by hand is only
what the kernels would have written: tokens on the device, lengths on the host.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    LogitsProcRequestState,
    build_custom_logits_processors,
)

from lenvm_vllm.engine.processor import LenvmLogitsProcessor
from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.v2 import V2Slots
from lenvm_vllm.plugin import PROCESSOR
from tests.support.fakes import Server, V, config, replicas_of

SLOTS = 5


def load(slots: LogitsProcRequestState, name: Any) -> LenvmLogitsProcessor:
    """The one processor that vLLM makes of `name`."""
    (made,) = build_custom_logits_processors(config(v2=True), slots, False, [name])
    assert isinstance(made, LenvmLogitsProcessor)
    assert isinstance(made.batch, V2Slots)
    return made


class Runner:
    """vLLM's buffers and steps. A row that vLLM left unwritten holds token 31."""

    def __init__(self, server: Server) -> None:
        def column() -> Any:
            return SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32))

        tokens = torch.full((SLOTS, 200), 31, dtype=torch.int32)
        self.slots = LogitsProcRequestState(
            device=torch.device("cpu"),
            max_num_reqs=SLOTS,
            vocab_size=V,
            all_token_ids=SimpleNamespace(gpu=tokens),
            prompt_len=column(),
            prefill_len=column(),
            total_len=SimpleNamespace(gpu=torch.zeros(SLOTS, dtype=torch.int32)),
        )
        self.lengths = [0] * SLOTS
        self.served = load(self.slots, PROCESSOR)
        self.served.batch.rows = EngineRows(config(v2=True), replicas_of(server))

    def add(self, slot: int, wanted: Any, prompt: Any = (7, 8), output: Any = ()) -> bool:
        text = [*prompt, *output]
        self.slots.prompt_len.np[slot] = len(prompt)
        self.slots.prefill_len.np[slot] = self.lengths[slot] = len(text)
        guided = self.served.add_request(slot, wanted)
        # vLLM brings staged tokens to the device after all requests of a step are added.
        self.slots.all_token_ids.gpu[slot] = 31
        self.slots.all_token_ids.gpu[slot, : len(text)] = torch.tensor(text, dtype=torch.int32)
        self.slots.total_len.gpu[slot] = len(text)
        return guided

    def append(self, slot: int, token: int) -> None:
        self.slots.all_token_ids.gpu[slot, self.lengths[slot]] = token
        self.lengths[slot] += 1
        self.slots.total_len.gpu[slot] = self.lengths[slot]

    def step(self, *slots: int, logits: Tensor | None = None, **computed: int) -> Tensor:
        """(rows, V) steered; computed: s<slot>=tokens of a prompt that are computed by now."""
        self.served.apply_staged_writes()
        lengths = [computed.get(f"s{slot}", self.lengths[slot]) for slot in slots]
        logits = torch.zeros(len(slots), V) if logits is None else logits.clone()
        index = torch.tensor(slots)
        context = LogitsContext(
            expanded_idx_mapping=index,
            idx_mapping=index,
            idx_mapping_np=index.numpy().astype(np.intp),
            expanded_local_pos=torch.zeros(len(slots), dtype=torch.int32),
            input_ids=torch.zeros(len(slots), dtype=torch.int32),
            pos=torch.tensor(lengths) - 1,
            seq_lens_upper_bound_np=np.array([*lengths, 0, 0], dtype=np.int32),  # padded
        )
        assert self.served.apply(logits, context) is logits
        return logits

"""A baseline without a model: the end gets likelier the nearer the text is to its target.

The idea of GenLengthLogitsProcessor in NVIDIA's logits-processor-zoo, aimed at a number of
tokens: the logit of end-of-sequence rises by STRENGTH·(t / N)^POWER after t of N tokens, where
a sentence or a line has just ended.

    vllm serve MODEL --logits-processors benchmarks.ramp:Ramp

`vllm_xargs: {"ramp_tokens": N}` asks for it. vLLM's Model Runner V1 only. Beside the plugin it
stands before it, and goes on from the `prefix_tokens` of an ending.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from lenvm_vllm.text.sentences import ends_sentence

FIELD = "ramp_tokens"
BEFORE = "length_prefix_tokens"  # tokens of the prompt that are the text's own
STRENGTH = 10.0  # nats at the target: more than a sentence's end lacks of certainty
POWER = 4.0


def boost(generated: int, target: int) -> float:
    """Nats that the end gains after `generated` tokens."""
    return STRENGTH * (generated / target) ** POWER


class Ramp(AdapterLogitsProcessor):
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self._stops = {i for i, text in enumerate(texts) if "\n" in text or ends_sentence(text)}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        target = (sampling_params.extra_args or {}).get(FIELD)
        if target is not None and not (isinstance(target, int) and target > 0):
            raise ValueError(f"{FIELD}: expected a number of tokens above 0, got {target!r}")

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        target = (params.extra_args or {}).get(FIELD)
        if target is None:
            return None
        before = (params.extra_args or {}).get(BEFORE, 0)
        return partial(self._raise_end, target, before, sorted(params.all_stop_token_ids))

    def _raise_end(
        self, target: int, before: int, ends: list[int], output_ids: list[int], logits: Tensor
    ) -> Tensor:
        if output_ids and output_ids[-1] in self._stops:
            logits[ends] += boost(before + len(output_ids), target)
        return logits

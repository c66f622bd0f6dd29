"""The one logits processor that vLLM loads, whichever model runner it uses."""

from typing import Any

from lenvm_vllm import vllm_hooks
from lenvm_vllm.rails import check_limits, rails_of
from lenvm_vllm.request import LengthTarget, LengthTargetError
from lenvm_vllm.v1 import V1Processor
from lenvm_vllm.v2 import V2Processor
from lenvm_vllm.vllm_names import V1LogitsProcessor, V2LogitsProcessor


class LenvmLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Steers requests with a length target; leaves all other rows as they are, to the bit.

    Each runner's loader wants a class of its own interface. This one is of both, and making
    one makes the adapter of the runner in use.
    """

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        adapter = V2Processor if vllm_config.use_v2_model_runner else V1Processor
        return adapter(vllm_config, *args, **kwargs)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError, which vLLM answers with HTTP 400."""
        target = LengthTarget.from_extra_args(sampling_params.extra_args)
        if target is None:
            return
        config = vllm_hooks.served_config
        if config is not None and config.speculative_config is not None:
            # A row of a draft token belongs to a text that may never be; nothing guides it.
            raise LengthTargetError("length_target: not available with speculative decoding")
        check_limits(
            rails_of(target),
            sampling_params.max_tokens,
            sampling_params.min_tokens,
            sampling_params.ignore_eos,
        )

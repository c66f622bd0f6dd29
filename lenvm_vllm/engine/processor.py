"""The one logits processor that vLLM loads, whichever model runner it uses."""

from typing import Any

from lenvm_vllm.engine.v1 import V1Processor
from lenvm_vllm.engine.v2 import V2Processor
from lenvm_vllm.host.names import V1LogitsProcessor, V2LogitsProcessor
from lenvm_vllm.target.admission import check_admission
from lenvm_vllm.target.request import LengthTarget


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
        """Raises ValueError, which vLLM answers with HTTP 400.

        vLLM does not say here which model is asked; `intake` knows, and checks again.
        """
        target = LengthTarget.from_extra_args(sampling_params.extra_args)
        if target is not None:
            check_admission(
                target,
                sampling_params.max_tokens,
                sampling_params.min_tokens,
                sampling_params.ignore_eos,
                sampling_params.thinking_token_budget,
                shows_stop=sampling_params.include_stop_str_in_output,
            )

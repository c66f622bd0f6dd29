"""The one logits processor that vLLM loads, whichever model runner it uses."""

from typing import Any

from torch import Tensor

from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.v1 import V1Batch
from lenvm_vllm.engine.v2 import V2Slots
from lenvm_vllm.host.names import V1LogitsProcessor, V2LogitsProcessor
from lenvm_vllm.host.sampling import check_unset
from lenvm_vllm.target.admission import Limits, check_admission
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.values.replicas import Replicas


class LenvmLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Steers requests with a length target; leaves all other rows as they are, to the bit.

    Each runner's loader wants a class of its own interface. This one is of both, and hands what
    the runner in use tells on to `batch`, which knows what request a row belongs to.
    """

    def __init__(self, vllm_config: Any, *args: Any, client: Replicas | None = None) -> None:
        """args: device and is_pin_memory of V1, vLLM's buffers by slot of V2."""
        rows = EngineRows(vllm_config, client)
        stages = vllm_config.parallel_config.pipeline_parallel_size
        v2 = vllm_config.use_v2_model_runner
        self.batch: Any = V2Slots(rows, *args) if v2 else V1Batch(rows, stages)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Of V1: how the batch changes, None where it does not."""
        self.batch.update(batch_update)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Of V2: whether this request, in the slot `req_idx`, is guided."""
        return bool(self.batch.add(req_idx, sampling_params))

    def apply_staged_writes(self) -> None:
        """Of V2: the requests of a step are there, and its forward pass has not begun."""
        self.batch.tell()

    def apply(self, logits: Tensor, *ctx: Any) -> Tensor:
        """logits: (rows, V) float32, changed in place. ctx: of V2, the slot of each row."""
        self.batch.steer_inplace(logits, *ctx)
        return logits

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError, which vLLM answers with HTTP 400.

        vLLM does not say here which model is asked; `intake` knows, and checks again.
        """
        target = LengthTarget.from_extra_args(sampling_params.extra_args)
        if target is not None:
            check_unset(sampling_params.extra_args)
            check_admission(target, Limits.of(sampling_params))

"""A value server by hand, and what vLLM gives a processor, for the tests of both model runners.

Legend: V vocabulary. Token 0 is the end; token x is worth x more tokens.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams

from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.values.lookahead import Keys
from lenvm_vllm.values.replicas import Replicas
from value_server.contract import wire
from value_server.contract.values import logit_from_length

V = 32
EOS = 0
INFO = wire.ModelInfo(
    gamma=0.99,
    base_model="toy",
    tokenizer_fingerprint="f" * 64,
    vocab_size=V,
    max_position=1000,
    max_sessions=100,
    max_candidates=64,
)


class Server:
    """Knows the length of every candidate; `error` is what it raises, if any. info: of it."""

    rests = False

    def __init__(self, error: Exception | None = None, **info: Any) -> None:
        self.error = error
        self.info = msgspec.structs.replace(INFO, **info)
        self.calls = 0
        self.last: wire.StepRequest | None = None
        self.requests: list[wire.StepRequest] = []
        self.sessions: set[str] = set()

    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
        self.calls += 1
        self._fail()
        return self.info

    def keys(self, info: wire.ModelInfo) -> Keys:
        return keys_of(info)

    def step(self, request: wire.StepRequest) -> wire.StepReply:
        self._fail()
        self.last = wire.decode_request(wire.encode(request))
        self.requests.append(self.last)
        self.sessions = (self.sessions | set(request.sessions)) - set(request.closed)
        lengths = wire.unpack_ids(request.candidates).astype(np.float64)
        z = logit_from_length(torch.from_numpy(lengths), INFO.gamma).float().numpy()
        counts = zip(request.starts, request.token_counts, strict=True)
        held = [a + b for a, b in counts]
        queries = queries_of([0.0] * len(held)) if request.lookahead_rank else b""
        return wire.StepReply(logits=wire.pack_logits(z), queries=queries, held=held)

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


def keys_of(info: wire.ModelInfo) -> Keys:
    """Of a lookahead head of rank 2 by which token x is worth x more tokens, nearly to float32,
    after the query (0, 1, 1). The end, and what is worth nothing, count as 0."""
    lengths = torch.arange(info.vocab_size, dtype=torch.float64).clamp(min=1)
    z = logit_from_length(lengths, info.gamma).numpy()
    high = z.astype(np.float16)
    keys = wire.pack_keys(np.stack([high, z - high], axis=1))
    return Keys(wire.LookaheadKeys(model_id=info.model_id, rank=2, keys=keys))


def queries_of(biases: Sequence[float]) -> bytes:
    """Of `keys_of`, with so much more z; NaN: none in time."""
    return wire.pack_logits(np.float32([[b, 1 + 0 * b, 1 + 0 * b] for b in biases]))


def rails_only(rows: EngineRows) -> EngineRows:
    """Nothing is steered, not even without values."""
    rows._plan = lambda logits, free: None  # type: ignore[method-assign]
    return rows


def replicas_of(server: Any) -> Replicas:
    return Replicas({"http://values": server})


def config(v2: bool = False, **lenvm: Any) -> Any:
    model = SimpleNamespace(skip_tokenizer_init=True, max_model_len=1000)
    return SimpleNamespace(
        additional_config={"lenvm": {"wait_floor_s": 30, "timeout_s": 30} | lenvm},
        model_config=model,
        parallel_config=SimpleNamespace(
            enable_batch_sharded_sampling=False, pipeline_parallel_size=1
        ),
        reasoning_config=None,
        speculative_config=None,
        use_v2_model_runner=v2,
    )


def params(length: Any = None, eos: int = EOS, **fields: Any) -> SamplingParams:
    """length: `length_target`, or the flat fields; None for a request without."""
    flat = {"length_target": length} if isinstance(length, int) else length
    made = SamplingParams(extra_args=flat, **{"max_tokens": 1000, **fields})
    made.update_from_generation_config({}, eos)
    return made


def entering(wanted: SamplingParams, prompt: Sequence[int] = (7,), **fields: Any) -> Any:
    """What vLLM makes of a request on its way into the engine."""
    others = {"lora_request": None, "mm_features": None, "prompt_embeds": None}
    return SimpleNamespace(
        sampling_params=wanted, prompt_token_ids=list(prompt), **(others | fields)
    )


def exactly(tokens: int) -> dict[str, Any]:
    return {"length_target": tokens, "length_tolerance": 0.0}


def free(tokens: int) -> dict[str, Any]:
    return {"length_target": tokens, "length_tolerance": "off"}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))

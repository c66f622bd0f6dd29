"""Backbones of other kinds: served as plain transformers would, or refused by name at the start.

Odds of passing by luck: candidates' logits differ by 0.05 and more, the tolerance is 1e-4.
"""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from tests.support import tiny
from tests.support.slots import check_integrity
from value_server.contract.checkpoint import CheckpointError
from value_server.engine.engine import Engine
from value_server.engine.job import Job, Row
from value_server.model.value_model import ValueHead, ValueModel

WINDOW = 7
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
HEADS = {"head_dim": 8}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
BLOOM = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}
MPT = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
}


def backbone(kind: str, options: dict[str, Any]) -> Any:
    """The real class with random weights: `kind` is its name before Config and Model."""
    config = getattr(tf, f"{kind}Config")(**options)
    return getattr(tf, f"{kind}Model")(config)


def build(kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> ValueModel:
    torch.manual_seed(1)
    decoder = backbone(kind, options)
    with torch.no_grad():  # q/k norms and others start as ones, biases as zeros
        for parameter in decoder.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return ValueModel(decoder.to(dtype), ValueHead(32), tiny.tiny_model().lenvm).eval()


SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", SMALL),
    "qwen3": ("Qwen3", SMALL | HEADS),
    "gemma": ("Gemma", SMALL | HEADS),
    "mistral, window": ("Mistral", SMALL | HEADS | {"sliding_window": WINDOW}),
    "gemma3, window, two ropes": (
        "Gemma3Text",
        SMALL | HEADS | MIXED | {"rope_parameters": TWO_ROPES},
    ),
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 4}),
    "qwen3 moe": ("Qwen3Moe", SMALL | HEADS | MOE),
    "gpt2": ("GPT2", GPT | {"initializer_range": 0.3}),
    "gpt neox": ("GPTNeoX", SMALL),
}


@pytest.mark.parametrize("alone", [0, 64], ids=["groups", "alone"])
@pytest.mark.parametrize("name", SERVED)
def test_served_as_by_plain_transformers(
    name: str, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of many windows, then a step that goes on from the cache."""
    monkeypatch.setattr("value_server.engine.attention.SHORT_QUERIES", alone)
    served, model = Engine(build(*SERVED[name]), slots=256), build(*SERVED[name])
    served.warm_up()
    prompt = [i * i % 50 for i in range(90)]
    first = served.run(Job([Row("a", 0, prompt, [1, 2, 3])]))
    second = served.run(Job([Row("a", 90, [2, 9], [5, 6, 7])]))
    for result, text, candidates in (
        (first, prompt, (1, 2, 3)),
        (second, [*prompt, 2, 9], (5, 6, 7)),
    ):
        with torch.inference_mode():
            expected = [model(torch.tensor([[*text, c]]))[0, -1].item() for c in candidates]
        np.testing.assert_allclose(result.logits, expected, atol=1e-4)
        assert np.ptp(expected) > 0.05


@pytest.mark.parametrize("name", SERVED)
def test_rounding_of_bfloat16_refuses_nothing(name: str) -> None:
    Engine(build(*SERVED[name], torch.bfloat16), slots=256).warm_up()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "encoder": ("Bert", SMALL, r"BertModel \(bert\).*differ from plain"),
    "encoder and decoder": ("T5", T5, r"T5Model \(t5\)"),
    "decoder that looks ahead": (
        "Gemma3Text",
        SMALL | HEADS | MIXED | {"use_bidirectional_attention": True},
        r"Gemma3TextModel \(gemma3_text\).*differ from plain",
    ),
    "attention of its own": (
        "GPTJ",
        GPT | {"rotary_dim": 4},
        r"GPTJModel \(gptj\).*0 of 2 layers use the attention interface",
    ),
    "alibi": ("Bloom", BLOOM, r"BloomModel \(bloom\).*max_position_embeddings"),
    "alibi, again": ("Mpt", MPT, r"MptModel \(mpt\).*max_position_embeddings"),
    "state space": (
        "Mamba",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        r"MambaModel \(mamba\)",
    ),
    "linear attention in one layer": (
        "Qwen3Next",
        SMALL | HEADS | MOE | {"layer_types": ["linear_attention", "full_attention"]},
        r"Qwen3NextModel \(qwen3_next\).*linear_attention",
    ),
    "chunks": (
        "Llama4Text",
        SMALL | HEADS | {"num_local_experts": 4, "intermediate_size_mlp": 48},
        r"Llama4TextModel \(llama4_text\).*chunked_attention",
    ),
    "softcap": ("Gemma2", SMALL | HEADS, r"Gemma2Model \(gemma2\).*'softcap'"),
    "sinks": (
        "GptOss",
        SMALL | HEADS | {"num_local_experts": 4},
        r"GptOssModel \(gpt_oss\).*'s_aux'",
    ),
    "window in its mask only": (
        "Qwen2Moe",
        SMALL | MOE | MIXED | {"use_sliding_window": True, "shared_expert_intermediate_size": 16},
        r"Qwen2MoeModel \(qwen2_moe\).*not told its sliding window",
    ),
    "dynamic rope": (
        "Llama",
        SMALL | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        r"LlamaModel \(llama\).*rope_type: 'dynamic'",
    ),
    "dynamic rope in one kind of layer": (
        "Gemma3Text",
        SMALL
        | HEADS
        | MIXED
        | {
            "rope_parameters": TWO_ROPES
            | {"full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
        },
        r"Gemma3TextModel \(gemma3_text\).*rope_type: 'dynamic'",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_anything_is_served(name: str, dtype: torch.dtype) -> None:
    kind, options, message = REFUSED[name]
    model = build(kind, options, dtype)
    with pytest.raises(CheckpointError, match=message):
        Engine(model, slots=256).warm_up()


def test_a_backbone_that_computes_otherwise_is_found_out() -> None:
    model = tiny.tiny_model()
    served = Engine(model, slots=256)
    for module in model.backbone.modules():
        if hasattr(module, "scaling"):
            module.scaling = module.scaling * 3
    with pytest.raises(CheckpointError, match=r"LlamaModel \(llama\).*differ from plain"):
        served.warm_up()


def test_warm_up_leaves_nothing_behind() -> None:
    served = Engine(tiny.tiny_model(), slots=64, max_candidates=1)
    served.warm_up()
    assert (served.forwarded, served.saved, served.cache.used) == (0, 0, 0)
    assert not served.cache.sessions
    check_integrity(served.cache)

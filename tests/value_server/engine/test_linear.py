"""Packed and fused linear layers against the plain ones of the same model."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
)

from value_server.engine.linear import (
    PACKED_ROWS,
    compile_inplace,
    compute_dtype,
    pack_inplace,
    weight_dtype,
)

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": lambda: LlamaModel(LlamaConfig(**SMALL)),
    "biases of q, k, v only": lambda: Qwen2Model(Qwen2Config(**SMALL)),
    "norms between": lambda: Gemma3TextModel(Gemma3TextConfig(**SMALL, head_dim=8)),
}


@torch.inference_mode()
def hidden(model: torch.nn.Module, rows: int) -> torch.Tensor:
    ids = torch.arange(rows)[None] * 7 % 63 + 1  # 0 is padding for some
    return model(ids, use_cache=False).last_hidden_state.float()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 5, PACKED_ROWS, PACKED_ROWS + 1, 60])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 0.25)],
)
def test_packed_is_plain(name: str, rows: int, dtype: torch.dtype, tolerance: float) -> None:
    """The hidden states have a spread of 1; an error in one weight would show as 0.3 and more."""
    torch.manual_seed(0)
    plain = MODELS[name]().eval().to(compute_dtype(dtype, CPU))
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias)
    packed = copy.deepcopy(plain)
    pack_inplace(packed, dtype)
    assert not any(type(m) is torch.nn.Linear for m in packed.modules())
    expected = hidden(plain, rows)
    error = (hidden(packed, rows) - expected).abs().max() / expected.std()
    assert error < tolerance


def test_compiled_is_plain() -> None:
    """Once for all layers and all numbers of rows."""
    torch.manual_seed(0)
    plain = MODELS["norms between"]().eval()
    compiled = copy.deepcopy(plain)
    compile_inplace(compiled)
    for rows in (2, 5, 60):
        torch.testing.assert_close(hidden(compiled, rows), hidden(plain, rows))


def test_siblings_may_be_asked_in_any_order_and_again() -> None:
    torch.manual_seed(0)
    layer = LlamaModel(LlamaConfig(**SMALL)).layers[0].self_attn
    names = ("q_proj", "k_proj", "v_proj")
    plain = {name: copy.deepcopy(getattr(layer, name)) for name in names}
    pack_inplace(layer, torch.float32)
    with torch.inference_mode():
        for order in (names, names[::-1], ("k_proj",), names):
            x = torch.randn(3, 32)
            for name in order:
                torch.testing.assert_close(getattr(layer, name)(x), plain[name](x))


def test_types() -> None:
    assert weight_dtype("float32", CPU) == torch.float32
    assert weight_dtype("auto", CPU) in (torch.bfloat16, torch.float16, torch.float32)
    assert compute_dtype(torch.float16, CPU) == torch.float32
    assert compute_dtype(torch.bfloat16, CPU) == torch.bfloat16
    assert compute_dtype(torch.float16, torch.device("cuda")) == torch.float16
    assert weight_dtype("auto", torch.device("cuda")) == torch.bfloat16

"""Tiny random models that vLLM serves; head size 32, which its CPU attention takes."""

import json
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.support.tiny import THINKING, tiny_tokenizer

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 256,
}
QWENS_DEFAULTS = {
    "eos_token_id": [256, 257],
    "do_sample": True,
    "top_k": 1,
    "repetition_penalty": 1.3,
}


def tiny_llm(folder: Path, seed: int = 0, more: tuple[str, ...] = ()) -> Path:
    """A checkpoint with the tokenizer of tests.support.tiny; returns `folder`."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=258 + len(more), pad_token_id=256, **SHAPE)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer(more).save_pretrained(folder)
    return folder


def tiny_qwen3(folder: Path) -> Path:
    """A Qwen3 that thinks; returns `folder`."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=258 + len(THINKING),
        head_dim=32,
        tie_word_embeddings=True,
        **SHAPE,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer(THINKING).save_pretrained(folder)
    return folder


def tiny_qwen(folder: Path) -> Path:
    """A Qwen2 with sampling defaults of its own; returns `folder`."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=258, tie_word_embeddings=True, **SHAPE)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(QWENS_DEFAULTS))
    tiny_tokenizer().save_pretrained(folder)
    return folder

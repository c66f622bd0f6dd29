"""A tiny random Llama that vLLM serves; head size 32, which its CPU attention takes."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.tiny import tiny_tokenizer


def tiny_llm(folder: Path, seed: int = 0, more: tuple[str, ...] = ()) -> Path:
    """A checkpoint with the tokenizer of tests.support.tiny; returns `folder`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258 + len(more),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer(more).save_pretrained(folder)
    return folder

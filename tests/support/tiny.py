"""Tiny random models: the real classes, small enough to build in a test."""

from pathlib import Path
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from value_server.contract.checkpoint import LenvmConfig, tokenizer_fingerprint
from value_server.model.lookahead import Lookahead
from value_server.model.value_model import ValueHead, ValueModel

GAMMA = 0.99
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


THINKING = ("<think>", "</think>")  # tokens 258 and 259 of a tiny model that thinks


def tiny_tokenizer(more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A token a byte (0 to 255), <|end|> (256, also end-of-sequence), <|start|> (257), `more`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|start|>", *more])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(
    seed: int = 0,
    layers: int = 2,
    max_position: int = 512,
    dtype: torch.dtype = torch.float32,
    more: tuple[str, ...] = (),
) -> ValueModel:
    """Random weights, large enough that logits differ from token to token; grouped heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258 + len(more),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )
    lenvm = LenvmConfig(
        gamma=GAMMA,
        base_model="tiny",
        weights="full",
        num_layers=layers,
        tokenizer_fingerprint=tokenizer_fingerprint(tiny_tokenizer(more)),
    )
    backbone = LlamaModel(config).to(dtype)
    return ValueModel(backbone, ValueHead(config.hidden_size), lenvm).eval()


def tiny_lookahead(rank: int = 5, **options: Any) -> ValueModel:
    """A tiny model with a lookahead head of random weights."""
    model = tiny_model(**options)
    lookahead = Lookahead(model.config.hidden_size, rank)
    with torch.no_grad():
        for weight in lookahead.parameters():
            weight.normal_(std=0.3)
    model.lenvm = msgspec.structs.replace(model.lenvm, lookahead_rank=rank)
    model.lookahead = lookahead
    return model.eval()


def tiny_checkpoint(
    folder: Path, seed: int = 0, max_position: int = 512, more: tuple[str, ...] = ()
) -> Path:
    """A full checkpoint with its tokenizer, as `lenvm serve` takes it; returns `folder`."""
    tiny_model(seed, max_position=max_position, more=more).save(folder)
    tiny_tokenizer(more).save_pretrained(folder)
    return folder

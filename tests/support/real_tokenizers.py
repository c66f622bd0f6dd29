"""Real tokenizers of three kinds, without a network: two of them come with vLLM itself."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mistral_common
from vllm.tokenizers import get_tokenizer

from lenvm_vllm.commands.demo import MODEL

# Bytes of a merge each (SmolLM2), pieces with bytes to fall back on (Mistral 7B), tiktoken's
# (Mistral Nemo).
NAMES = ("byte-level", "sentencepiece", "tekken")
_DATA = Path(mistral_common.__file__).parent / "data"


@cache
def real(name: str) -> Any:
    """As vLLM makes it of a model's folder; `name`: one of NAMES."""
    if name == "byte-level":
        return get_tokenizer(str(MODEL))
    folder = Path(mkdtemp(prefix="lenvm-tokenizer-"))
    if name == "tekken":
        shutil.copy(_DATA / "tekken_240911.json", folder / "tekken.json")
        return get_tokenizer(str(folder), tokenizer_mode="mistral")
    shutil.copy(_DATA / "tokenizer.model.v1", folder / "tokenizer.model")
    for file, content in (
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
        ("config.json", {"model_type": "llama"}),
    ):
        (folder / file).write_text(json.dumps(content))
    return get_tokenizer(str(folder))

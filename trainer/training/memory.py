"""What of a backbone takes less memory on a GPU: attention without a dense mask, 4-bit weights."""

from importlib.util import find_spec
from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from trainer.checks import check, check_choice

Attention = Literal["sdpa", "flex", "flash"]
Quantize = Literal["4bit"]
# By transformers' names. The last two tell packed texts apart without a mask of length x length.
ATTENTION: dict[Attention, str] = {
    "sdpa": "sdpa",
    "flex": "flex_attention",
    "flash": "flash_attention_2",
}


def check_attention(attention: Attention) -> None:
    """Raises ValueError where it cannot train here."""
    check_choice("attention", attention, ATTENTION)
    on_gpu = torch.cuda.is_available()  # on a CPU neither has a backward pass
    check(attention == "sdpa" or on_gpu, "attention", attention, "sdpa without a GPU")
    if attention == "flash":
        check_installed("attention", attention, "flash_attn", "flash-attn")


def check_quantize(quantize: Quantize | None, tune: str) -> None:
    """Raises ValueError where weights cannot be quantised, or would have to train."""
    if quantize is None:
        return
    check_choice("quantize", quantize, ("4bit",))
    check(tune != "full", "quantize", quantize, "left out with tune full: 4 bits do not train")
    check_installed("quantize", quantize, "bitsandbytes", "bitsandbytes")


def check_installed(field: str, value: str, module: str, package: str) -> None:
    """Raises ValueError naming the package that a choice needs."""
    there = find_spec(module) is not None
    check(there, field, value, f"left out, or `pip install {package}` first")


def quantization(quantize: Quantize | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """As QLoRA has it: normal floats of 4 bits, their scales quantised too, sums in `dtype`."""
    if quantize is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )

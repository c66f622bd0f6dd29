"""Where a sentence ends: the place to end a text at."""

import re
from typing import Any

from lenvm_vllm import vllm_names

SENTENCE = 16  # tokens of a short one
_SENTENCE_END = re.compile(r"[.!?。！？…؟۔।](?:[\"'”’»」』)\]*_`]|</?\w+>)*$|```$")  # noqa: RUF001


def ends_sentence(text: str) -> bool:
    """Whether it stops at the end of a sentence or of a code block, behind quotes and the like."""
    return bool(_SENTENCE_END.search(text.rstrip()))


def closing_ids(tokenizer: Any) -> list[int]:
    """Tokens that end a sentence, of any tokenizer with `get_vocab` and `decode`."""
    return [
        i for i in sorted(tokenizer.get_vocab().values()) if ends_sentence(tokenizer.decode([i]))
    ]


def tokenizer_of(vllm_config: Any) -> Any:
    """The tokenizer that vLLM serves; None when it serves none."""
    served = vllm_config.model_config
    return None if served.skip_tokenizer_init else vllm_names.cached_tokenizer_from_config(served)

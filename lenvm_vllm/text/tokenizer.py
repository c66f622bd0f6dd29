"""What is asked of the served model's tokenizer, of whichever kind it is."""

from typing import Any

from lenvm_vllm.host import names as vllm_names

_PLAIN = "a"


def tokenizer_of(vllm_config: Any) -> Any:
    """The tokenizer that vLLM serves; None when it serves none."""
    served = vllm_config.model_config
    return None if served.skip_tokenizer_init else vllm_names.cached_tokenizer_from_config(served)


def texts_of(tokenizer: Any) -> dict[int, str]:
    """The text of each token in the middle of a text, "" of a special one.

    tokenizer: any with `get_vocab`, `encode` and `decode`.
    """
    size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    before = tokenizer.encode(_PLAIN, add_special_tokens=False)
    start = decoded(tokenizer, before)
    return {
        token: decoded(tokenizer, [*before, token]).removeprefix(start)
        for token in range(size)  # not all of them are in the vocabulary by a name of their own
    }


def specials_of(tokenizer: Any) -> dict[int, str]:
    """The text of each special token, where a client has them shown."""
    known = getattr(tokenizer, "added_tokens_decoder", {})
    return {token: added.content for token, added in known.items() if added.special}


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of tokens as vLLM makes it for a client, which cleans up no spaces."""
    fast = getattr(tokenizer, "_tokenizer", None)
    own: Any = fast if hasattr(fast, "decoder") else tokenizer
    slow = hasattr(own, "clean_up_tokenization_spaces")  # it would, as its files say
    kept = {"clean_up_tokenization_spaces": False} if slow else {}
    return str(own.decode(ids, skip_special_tokens=True, **kept))

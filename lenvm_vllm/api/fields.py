"""What each field of a request means for another ending of its answer.

Another ending is a text completion whose prompt is the answer's own tokens. What made the
prompt is in those tokens already; what samples has to be the same; what would need the text
before the cut, or another form of answer, rules other endings out unless it has a neutral value.
The table knows every field of vLLM's chat and text completions and of the OpenAI client, and a
test walks over both. A field that it does not know rules other endings out.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any


class Rule(Enum):
    """CARRIED: goes along as it is. SEEN_TO: made the prompt, or is dealt with by the ending.
    ANY: changes nothing in a text, or nothing that vLLM reads."""

    CARRIED = "carried"
    SEEN_TO = "seen to"
    ANY = "any"


# A field's rule, or the values with which it changes nothing.
Meaning = Rule | tuple[Any, ...]

_UNSET: Meaning = (None, 0)  # of numbers
_OFF: Meaning = (None, False)
_ON: Meaning = (None, True)
_NONE: Meaning = (None, [], "")

FIELDS: dict[str, Meaning] = {
    **dict.fromkeys(
        (
            *("model", "user", "priority", "session_id", "cache_salt", "vllm_xargs"),
            *("seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
            *("logit_bias", "allowed_token_ids", "watermarking"),
        ),
        Rule.CARRIED,
    ),
    **dict.fromkeys(
        (
            *("messages", "prompt", "documents", "chat_template", "chat_template_kwargs"),
            *("add_special_tokens", "add_generation_prompt", "continue_final_message"),
            *("truncate_prompt_tokens", "truncation_side", "reasoning_effort"),
            *("max_tokens", "max_completion_tokens", "min_tokens", "n", "return_token_ids"),
            # The first answer tells these, and what is returned is that answer.
            *("request_id", "prompt_logprobs", "return_prompt_text", "return_token_offsets"),
        ),
        Rule.SEEN_TO,
    ),
    **dict.fromkeys(
        (
            # of tools, beams, pictures, streams, logprobs and special tokens, where there are any
            *("parallel_tool_calls", "length_penalty", "media_io_kwargs", "mm_processor_kwargs"),
            *("mm_payload", "return_mm_kwargs", "stream_interval", "return_tokens_as_token_ids"),
            "spaces_between_special_tokens",
            # of OpenAI's; vLLM does not read them
            *("metadata", "store", "service_tier", "safety_identifier", "moderation"),
            *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
            *("audio", "modalities", "prediction", "verbosity", "web_search_options"),
            *("functions", "function_call", "best_of"),
        ),
        Rule.ANY,
    ),
    "stream": _OFF,
    "stream_options": (None,),
    "logprobs": (None,),  # of a text completion 0 asks for some; see CHAT_FIELDS
    "top_logprobs": _UNSET,
    "logprob_token_ids": (None,),
    "frequency_penalty": _UNSET,
    "presence_penalty": _UNSET,
    "stop": _NONE,
    "stop_token_ids": _NONE,
    "include_stop_str_in_output": _OFF,
    "bad_words": _NONE,
    "ignore_eos": _OFF,
    "echo": _OFF,
    "suffix": _NONE,
    "skip_special_tokens": _ON,
    "include_reasoning": _ON,
    "thinking_token_budget": (None,),
    "tools": _NONE,
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "repetition_detection": (None,),
    "routed_experts_prompt_start": _UNSET,
    "return_weight_versions": _OFF,  # of 0.33
    "use_beam_search": _OFF,
    "prompt_embeds": (None,),
    "kv_transfer_params": (None,),
    "ec_transfer_params": (None,),
}
CHAT_FIELDS: dict[str, Meaning] = {"logprobs": _OFF}
CARRIED = frozenset(name for name, rule in FIELDS.items() if rule is Rule.CARRIED)

# The parts of a content that are text, and where in them it stands.
_PARTS = {"text": "text", "input_text": "text", "output_text": "text"}
_PARTS |= {"refusal": "refusal", "thinking": "thinking"}
_BESIDE = {"type", "annotations", "cache_control", "citations", "closed", "logprobs", "signature"}


def allow_endings(request: Mapping[str, Any]) -> bool:
    """Whether no field of a chat or text completion rules other endings out."""
    chat = "messages" in request
    known = FIELDS | CHAT_FIELDS if chat else FIELDS
    if request.get("tool_choice") == "none":  # then they are a part of the prompt, no more
        known = known | {"tools": Rule.ANY}
    for name, value in request.items():
        meaning = known.get(name, ())
        if isinstance(meaning, tuple) and not any(_same(value, neutral) for neutral in meaning):
            return False
    return _all_words(request["messages"]) if chat else _is_prompt(request.get("prompt"))


def sole(prompt: Any) -> Any:
    """The prompt out of a list that holds no other, as some clients send it; else as it is."""
    is_list_of_one = isinstance(prompt, list) and len(prompt) == 1 and type(prompt[0]) is not int
    return prompt[0] if is_list_of_one else prompt


def text_of(content: Any) -> str | None:
    """The text of a message's content, a string or a list of text parts; None for other parts.

    Joined as vLLM does it.
    """
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = [_text_of_part(part) for part in content]
    return None if None in texts else "\n".join(text for text in texts if text is not None)


def _text_of_part(part: Any) -> str | None:
    if not isinstance(part, dict):
        return part if isinstance(part, str) else None
    name = _PARTS.get(str(part.get("type", "text")), "")
    value = part.get(name)
    return value if isinstance(value, str) and part.keys() <= _BESIDE | {name} else None


def _all_words(messages: Any) -> bool:
    """Whether the prompt is text alone. A call of a tool in the history has no content."""
    return isinstance(messages, list) and all(
        isinstance(message, dict)
        and (message.get("content") is None or text_of(message["content"]) is not None)
        for message in messages
    )


def _is_prompt(prompt: Any) -> bool:
    """Whether it is one, of words or of token ids."""
    prompt = sole(prompt)
    one = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    return isinstance(prompt, str) or one


def _same(value: Any, neutral: Any) -> bool:
    """Equal, where False is not 0: `logprobs` of a text completion tells them apart."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)

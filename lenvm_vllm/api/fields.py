"""What each field of a request means for another ending of its answer.

Another ending is a text completion whose prompt is the answer's own tokens. What made the
prompt is in those tokens already; what samples has to be the same; what would need the text
before the cut, or another form of answer, rules other endings out unless it has a neutral value.
The table knows every field of vLLM's chat and text completions and of the OpenAI client, and a
test walks over both. A field that it does not know rules other endings out.
"""

from typing import Any

from lenvm_vllm.api.prompts import is_text


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# These go along as they are.
CARRIED = _names("""
    model user priority session_id cache_salt vllm_xargs
    seed temperature top_p top_k min_p repetition_penalty
    logit_bias allowed_token_ids watermarking
""")
# These made the prompt, or are dealt with by the ending; the first answer tells the last six,
# and what is returned is that answer.
SEEN_TO = _names("""
    messages prompt documents chat_template chat_template_kwargs
    add_special_tokens add_generation_prompt continue_final_message
    truncate_prompt_tokens truncation_side reasoning_effort
    max_tokens max_completion_tokens min_tokens n return_token_ids
    request_id prompt_logprobs return_prompt_text return_token_offsets
    stream stream_options
""")
# These change nothing in a text, or nothing that vLLM reads: fields of tools, beams, pictures,
# streams, logprobs and special tokens, where there are any, of OpenAI's own and of Dynamo's.
ANY = _names("""
    parallel_tool_calls length_penalty media_io_kwargs mm_processor_kwargs
    mm_payload return_mm_kwargs stream_interval return_tokens_as_token_ids
    spaces_between_special_tokens
    metadata store service_tier safety_identifier moderation
    prompt_cache_key prompt_cache_options prompt_cache_retention
    audio modalities prediction verbosity web_search_options
    functions function_call best_of
    nvext
""")
# These change nothing while they have one of these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprobs": (None,),  # of a text completion 0 asks for some; see OF_CHAT
    "top_logprobs": (None, 0),
    "logprob_token_ids": (None,),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "stop": (None, [], ""),
    "stop_token_ids": (None, []),
    "include_stop_str_in_output": (None, False),
    "bad_words": (None, []),
    "ignore_eos": (None, False),
    "echo": (None, False),
    "suffix": (None, ""),
    "skip_special_tokens": (None, True),
    "include_reasoning": (None, True),
    "thinking_token_budget": (None,),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "repetition_detection": (None,),
    "routed_experts_prompt_start": (None, 0),
    "return_weight_versions": (None, False),  # of 0.33
    "use_beam_search": (None, False),
    "prompt_embeds": (None,),
    "kv_transfer_params": (None,),
    "ec_transfer_params": (None,),
}
OF_CHAT: dict[str, tuple[Any, ...]] = {"logprobs": (None, False)}
FIELDS = CARRIED | SEEN_TO | ANY | NEUTRAL.keys()


def allow_endings(request: dict[str, Any]) -> bool:
    """Whether no field of a chat or text completion rules other endings out."""
    neutral = NEUTRAL | OF_CHAT if "messages" in request else NEUTRAL
    free = FIELDS - NEUTRAL.keys()
    if request.get("tool_choice") == "none":  # then they are a part of the prompt, no more
        free |= {"tools"}
    return is_text(request) and all(
        name in free or any(_same(value, other) for other in neutral.get(name, ()))
        for name, value in request.items()
    )


def _same(value: Any, neutral: Any) -> bool:
    """Equal, where False is not 0: `logprobs` of a text completion tells them apart."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)

"""The table of fields knows every field of vLLM's requests, and what each does to other endings."""

import typing
from typing import Any

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from pydantic_core import PydanticUndefined
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from lenvm_vllm.api.fields import ANY, FIELDS, OF_CHAT, allow_endings

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"prompt": "hi"}
REQUESTS = {ChatCompletionRequest: CHAT, CompletionRequest: TEXT}
OPENAI = (
    chat_params.CompletionCreateParamsNonStreaming,
    text_params.CompletionCreateParamsNonStreaming,
)


@pytest.mark.parametrize("request_class", REQUESTS)
def test_the_table_knows_every_field_of_vllm(request_class: Any) -> None:
    assert request_class.model_fields.keys() - FIELDS == set()


@pytest.mark.parametrize("params", OPENAI)
def test_the_table_knows_every_field_of_the_openai_client(params: Any) -> None:
    assert typing.get_type_hints(params).keys() - FIELDS == set()


def test_the_table_knows_no_field_that_is_none() -> None:
    known = {name for request_class in REQUESTS for name in request_class.model_fields}
    known |= {name for params in OPENAI for name in typing.get_type_hints(params)}
    assert FIELDS - known <= {"return_weight_versions", "nvext"}  # of vLLM 0.33, of Dynamo
    assert OF_CHAT.keys() <= FIELDS


@pytest.mark.parametrize("request_class", REQUESTS)
def test_to_say_what_vllm_takes_anyway_changes_nothing(request_class: Any) -> None:
    for name, field in request_class.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if default is not PydanticUndefined and name != "prompt":
            assert allow_endings(REQUESTS[request_class] | {name: default}), name


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"run": "7"}},
        {"tool_choice": "none"},
        {"tool_choice": "none", "tools": [{"type": "function"}]},
        {"parallel_tool_calls": True},
        {"parallel_tool_calls": False},
        {"skip_special_tokens": True},
        {"service_tier": "auto"},
        {"reasoning_effort": "low"},
        {"user": "me"},
        {"store": True},
        {"logprobs": False},
        {"stop": []},
        {"frequency_penalty": 0.0},
        {"session_id": "s"},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"response_format": {"type": "text"}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
    ],
)
def test_fields_that_leave_an_answer_its_other_endings(fields: dict[str, Any]) -> None:
    assert allow_endings(CHAT | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"skip_special_tokens": False},
        {"include_reasoning": False},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "auto"},
        {"tool_choice": "required", "tools": [{"type": "function"}]},
        {"logprobs": True},
        {"stop": "x"},
        {"presence_penalty": 0.5},
        {"response_format": {"type": "json_object"}},
        {"thinking_token_budget": 10},
        {"kv_transfer_params": {"do_remote_prefill": True}},
        {"a_field_of_tomorrow": 1},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": "hi"},
    ],
)
def test_fields_that_rule_other_endings_out(fields: dict[str, Any]) -> None:
    assert not allow_endings(CHAT | fields)


@pytest.mark.parametrize("logprobs", [0, False, 3])
def test_a_number_of_logprobs_asks_for_some(logprobs: Any) -> None:
    """Of a text completion; vLLM takes False for 0 there."""
    assert not allow_endings(TEXT | {"logprobs": logprobs})
    assert allow_endings(TEXT | {"logprobs": None})


@pytest.mark.parametrize("name", sorted(ANY))
def test_any_value(name: str) -> None:
    assert allow_endings(CHAT | {name: object()})

"""Every door of a real `vllm serve`, with a key, priorities, forecasts, and an operator's
middleware that compresses; a real value server behind it. Both are tiny."""

import re
from typing import Any

import httpx
import pytest

from lenvm_vllm.api.routes import BATCH, CHAT, GENERATE, INVOCATIONS, MESSAGES, RESPONSES, TEXT
from tests.e2e.pairs import Pair
from tests.support.tiny import tiny_tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.pair("doors")]

EXACT = {"tokens": "30", "tolerance": "0"}
HELLO = [{"role": "user", "content": "hi"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
PREFILL = {"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}


@pytest.fixture
def client(pair: Pair) -> httpx.Client:
    """With the key."""
    return pair.client


def post(client: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    return client.post(path, json={"model": "tiny", **fields})


def length(reply: httpx.Response) -> int:
    """Completion tokens, streamed or not; of token ids out they are counted."""
    assert reply.status_code == 200, reply.text
    if found := re.findall(r'"(?:completion|output)_tokens":\s*(\d+)', reply.text):
        return int(found[-1])
    return len(reply.json()["choices"][0]["token_ids"])


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": HELLO}),
        (TEXT, {"prompt": "hi", "max_tokens": 60}),
        (RESPONSES, {"input": "hi"}),
        (MESSAGES, {"messages": HELLO, "max_tokens": 60}),
        (BATCH, {"messages": [HELLO]}),
        (INVOCATIONS, {"messages": HELLO}),
        (INVOCATIONS, {"prompt": "hi", "max_tokens": 60}),
        (INVOCATIONS, {"messages": HELLO, "stream": True, "stream_options": {"include_usage": 1}}),
        (GENERATE, {"token_ids": [97, 98], "sampling_params": {"max_tokens": 60}}),
        (GENERATE, {"token_ids": [97, 98], "sampling_params": {}}),
    ],
)
def test_a_length_on_every_door(client: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    reply = post(client, path, length_target=EXACT, **fields)
    assert length(reply) == 30
    if "stream" not in fields:  # those are not compressed
        assert reply.headers["content-encoding"] == "gzip"
    reply = post(client, path, length_target={"tokens": 0}, **fields)
    assert reply.status_code == 400
    assert "length_target.tokens" in reply.text


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": HELLO}),
        (TEXT, {"prompt": "hi", "max_tokens": 60}),
        (RESPONSES, {"input": "hi"}),
        (MESSAGES, {"messages": HELLO, "max_tokens": 60}),
    ],
)
def test_a_request_that_one_door_prepares_for_another(
    client: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    ready = post(client, f"{path}/render", length_target=EXACT, **fields)
    assert ready.status_code == 200, ready.text
    request = ready.json()[0] if isinstance(ready.json(), list) else ready.json()
    assert length(client.post(GENERATE, json=request)) == 30
    assert post(client, f"{path}/render", length_target=0, **fields).status_code == 400


def test_doors_that_write_no_text(client: httpx.Client) -> None:
    scoring = {"query": "a", "items": ["b"], "label_token_ids": [97, 98]}
    reply = post(client, "/generative_scoring", length_target=5, **scoring)
    assert (reply.status_code, "writes no text" in reply.text) == (400, True)
    count = post(client, f"{MESSAGES}/count_tokens", messages=HELLO, length_target=5)
    assert count.status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES, MESSAGES, BATCH, GENERATE])
def test_without_a_key(client: httpx.Client, path: str) -> None:
    body = {"model": "tiny", "prompt": "hi", "length_target": 0}
    url = f"{client.base_url}{path}"
    assert httpx.post(url, json=body, timeout=60, trust_env=False).status_code == 401


def test_a_400_reaches_a_page(client: httpx.Client) -> None:
    origin = {"Origin": "http://page"}
    reply = client.post(TEXT, json={"prompt": "hi", "length_target": 0}, headers=origin)
    assert reply.status_code == 400
    assert reply.headers["access-control-allow-origin"] == "http://page"


def test_metrics_are_compressed_as_a_whole(client: httpx.Client) -> None:
    reply = client.get("/metrics")
    assert reply.headers["content-encoding"] == "gzip"
    assert "lenvm_requests_total" in reply.text
    assert "vllm:generation_tokens_total" in reply.text


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_prefill(client: httpx.Client, path: str) -> None:
    """As a proxy sends it: one token, whatever the target; the decoding side sends the rest."""
    asked = {"messages": HELLO} if path == CHAT else {"prompt": "hi"}
    for target in ({"length_target": 50}, {"vllm_xargs": {"length_target": 50}}):
        reply = post(client, path, max_tokens=1, **asked, **target, **PREFILL)
        assert length(reply) == 1
        assert post(client, path, max_tokens=1, **asked, **target).status_code == 400
    assert post(client, path, max_tokens=1, length_target=0, **asked, **PREFILL).status_code == 400


@pytest.mark.parametrize(
    "fields",
    [
        {"length_target": "80 words"},
        {"length_target": {"sentences": 8}},
        {"length_target": {"tokens": 80, "tolerance": 10}},
        {"lengthTarget": 80},
        {"target_length": 80},
        {"extra_body": {"length_target": 80}},
        {"vllm_xargs": {"lengthTarget": 80}},
    ],
)
def test_what_would_be_ignored_is_named(client: httpx.Client, fields: dict[str, Any]) -> None:
    for path, asked in ((CHAT, {"messages": HELLO}), (RESPONSES, {"input": "hi"})):
        for stream in (False, True):
            reply = post(client, path, stream=stream, **asked, **fields)
            assert reply.status_code == 400, (path, reply.text)
            assert re.search("(?i)length_?target|target_length", reply.text)


END = tiny_tokenizer().eos_token_id
# With an end that is never natural, so that others are sampled.
LETTERS = {
    "allowed_token_ids": [*tiny_tokenizer().encode("abcdefghijklmnop"), END],
    "logit_bias": {str(END): -3.0},
    "temperature": 1.0,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"run": "7"}, "store": True, "user": "me", "service_tier": "auto"},
        {"tool_choice": "none", "parallel_tool_calls": True},
        {"skip_special_tokens": True, "logprobs": False, "include_reasoning": True},
        {"reasoning_effort": "low"},
        {"messages": PARTS},
    ],
)
@pytest.mark.parametrize("path", [CHAT, INVOCATIONS])
def test_fields_that_leave_other_endings(
    client: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    target = {"tokens": 50, "tolerance": 0.2, "endings": 8}
    asked = {"messages": HELLO, **LETTERS}
    reply = post(client, path, length_target=target, **asked | fields)
    assert length(reply) in range(40, 61)
    assert int(reply.headers["lenvm-sampled-tokens"]) > length(reply) + 10
    assert reply.json()["choices"][0]["length_result"]["endings"] in (5, 8)


def test_a_list_of_one_prompt_leaves_other_endings(client: httpx.Client) -> None:
    """As LangChain sends each prompt of a text completion."""
    asked = {"prompt": ["hi"], "max_tokens": 256, **LETTERS}
    target = {"tokens": 50, "tolerance": 0.2, "endings": 8}
    reply = post(client, TEXT, length_target=target, **asked)
    assert length(reply) in range(40, 61)
    assert reply.json()["choices"][0]["length_result"]["endings"] in (5, 8)


def test_a_forecast_of_parts(client: httpx.Client) -> None:
    """Is that of the text; a client's own priority is taken, and a wrong one refused."""
    seen = set()
    for messages in (HELLO, PARTS):
        reply = post(client, CHAT, messages=messages, max_tokens=500, priority=3, ignore_eos=True)
        assert reply.status_code == 200, reply.text
        seen.add(reply.headers["lenvm-predicted-tokens"])
    assert len(seen) == 1
    assert post(client, CHAT, messages=HELLO, max_tokens=3, priority="high").status_code == 400


def test_the_playground_needs_no_key_but_its_requests_do(client):
    with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False) as stranger:
        page = stranger.get("/lenvm")
        assert page.status_code == 200
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert stranger.get("/lenvm/app.js").headers["content-type"].startswith("text/javascript")
        assert stranger.get("/v1/models").status_code == 401
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 512

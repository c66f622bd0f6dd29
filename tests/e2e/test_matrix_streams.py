"""Streams whose end is written again, of a real `vllm serve` and a real value server, both tiny."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.pairs import Pair
from tests.support.tiny import tiny_tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.pair("tiny")]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {CHAT: {"messages": [{"role": "user", "content": "hi"}]}, TEXT: {"prompt": "hi"}}
TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
# Of letters, since random bytes are no text that could be continued, and with an end that is never
# natural.
LETTERS = [*TOKENIZER.encode("abcdefghijklmnopqrstuvwxyz"), END]
ASKED: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 256,
    "temperature": 1.0,
    "allowed_token_ids": LETTERS,
    "logit_bias": {str(END): -3.0},
    "return_token_ids": True,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}


def chunks(client: httpx.Client, path: str, **fields: Any) -> Iterator[Any]:
    with client.stream("POST", path, json=ASKED | ASK[path] | fields) as reply:
        assert reply.status_code == 200
        last = ""
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))
            last = line or last
    assert last == "data: [DONE]"


def text_of(choice: Any) -> str:
    return str(choice["delta"].get("content") or "" if "delta" in choice else choice["text"])


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("unit", "amount"), [("tokens", 50), ("characters", 49)])
def test_other_endings_of_a_stream(pair: Pair, path: str, unit: str, amount: int) -> None:
    target = {unit: amount, "tolerance": 0.2, "endings": 8}
    found = list(chunks(pair.client, path, length_target=target))
    choices = [choice for chunk in found for choice in chunk["choices"]]
    ids = [i for choice in choices for i in choice.get("token_ids") or ()]
    text = "".join(map(text_of, choices))
    result = choices[-1]["length_result"]
    assert [c for c in choices if c.get("finish_reason")] == [choices[-1]]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    assert (len(ids), len(text)) == (result["tokens"], result["characters"])
    assert found[-1]["usage"]["completion_tokens"] == len(ids)
    assert found[-2]["usage"]["completion_tokens"] == len(ids)
    assert 40 <= len(ids) <= 60
    if unit == "tokens":  # in another one, a text may have to end where no values were needed
        assert result["endings"] in (5, 8)
        assert result["sampled_tokens"] > len(ids) + 4 * 8


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stream_of_one_ending_is_not_held(pair: Pair, path: str) -> None:
    target = {"tokens": 50, "tolerance": 0.2, "endings": 1}
    found = list(chunks(pair.client, path, length_target=target))
    result = next(c for chunk in found[::-1] for c in chunk["choices"])["length_result"]
    assert (result["endings"], result["sampled_tokens"]) == (1, result["tokens"])


def test_a_client_who_hangs_up_while_tokens_are_held(pair: Pair) -> None:
    """Nothing of it runs on."""
    for _ in chunks(pair.client, CHAT, length_target={"tokens": 230, "endings": 64}):
        break
    for _ in range(10):  # the gauge is of the last step
        list(chunks(pair.client, CHAT, length_target={"tokens": 20, "endings": 1}))
        lines = pair.client.get("/metrics").text.splitlines()
        running = {float(line.split()[-1]) for line in lines if "num_requests_running{" in line}
        if running == {0.0}:
            return
    raise AssertionError(running)

"""A real `vllm serve` with the bare flag and no value server: rails and request field."""

import httpx
import pytest

from tests.e2e.pairs import Pair

pytestmark = [pytest.mark.e2e, pytest.mark.pair("alone")]

END = 256


@pytest.fixture
def client(pair: Pair) -> httpx.Client:
    return pair.client


def complete(client: httpx.Client, **fields: object) -> httpx.Response:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 200, "seed": 1, **fields}
    return client.post("/v1/completions", json=body)


def tokens(reply: httpx.Response) -> int:
    assert reply.status_code == 200, reply.text
    return int(reply.json()["usage"]["completion_tokens"])


@pytest.mark.parametrize("length", [2, 3, 32, 100])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_exact(client, length, temperature):
    target = {"tokens": length, "tolerance": 0.0}
    asked = {"temperature": temperature, "return_token_ids": True}
    reply = complete(client, length_target=target, **asked)
    assert tokens(reply) == length
    assert reply.json()["choices"][0]["token_ids"][-1] == END


def test_default_rails_and_one_sided_modes(client):
    assert 45 <= tokens(complete(client, length_target=50)) <= 55
    at_most = {"mode": "at_most", "tokens": 20}
    assert tokens(complete(client, length_target=at_most, temperature=1.0)) <= 20
    at_least = {"mode": "at_least", "tokens": 40}
    assert tokens(complete(client, length_target=at_least, temperature=2.0)) >= 40


def test_the_end_comes_before_the_wall(client):
    """Of max_tokens, and of the context: 512 tokens, 12 of the prompt."""
    for wall in (100, 95, 90):
        for target in (100, {"mode": "at_most", "tokens": 120}):
            asked = {"max_tokens": wall, "temperature": 1.0, "return_token_ids": True}
            reply = complete(client, length_target=target, **asked)
            assert tokens(reply) <= wall
            assert reply.json()["choices"][0]["token_ids"][-1] == END
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "h" * 400}],
        "length_target": {"mode": "at_least", "tokens": 30},
        "return_token_ids": True,
        "logit_bias": {"258": -100, "259": -100},  # no thinking, which would not be cut
    }
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.json()["choices"][0]["token_ids"][-1] == END
    assert 30 <= tokens(reply) < 112
    body["length_target"] = 150  # that the prompt leaves no room for
    assert client.post("/v1/chat/completions", json=body).status_code == 400


def test_a_stop_string_waits_for_the_lower_rail(client):
    """A space comes every few bytes; the first one from the 40th token on ends the text."""
    stop = [chr(code) for code in range(32, 127)][:4]
    free = complete(client, stop=stop, temperature=2.0, max_tokens=150)
    assert tokens(free) < 40
    for target in (50, {"mode": "at_least", "tokens": 45}):
        held = complete(client, stop=stop, length_target=target, temperature=2.0, max_tokens=150)
        assert tokens(held) >= 45


def test_a_grammar_has_the_last_word(client):
    """One that is done is done, and what it asks for is whole, whatever the rails say."""
    done = complete(
        client,
        structured_outputs={"choice": ["yes"]},
        length_target={"mode": "at_least", "tokens": 40},
    )
    assert (tokens(done), done.json()["choices"][0]["text"]) == (4, "yes")
    whole = complete(
        client,
        structured_outputs={"regex": "[a-z]{10}"},
        length_target={"mode": "at_most", "tokens": 5},
    )
    (choice,) = whole.json()["choices"]
    assert (tokens(whole), len(choice["text"])) == (11, 10)
    assert choice["length_result"]["passed_rail"] is True
    assert done.json()["choices"][0]["length_result"]["passed_rail"] is False


def test_a_tool_call_is_neither_cut_nor_held_open(client):
    """Tokens 258 and 259 begin and end one; a text of calls alone has none that count."""
    asked = {"temperature": 1.0, "return_token_ids": True, "max_tokens": 60}
    begun = complete(client, logit_bias={"258": 100.0}, length_target=20, **asked)
    assert (tokens(begun), begun.json()["choices"][0]["finish_reason"]) == (60, "length")
    at_least = {"mode": "at_least", "tokens": 50}
    for seed in range(8):
        reply = complete(
            client,
            length_target=at_least,
            allowed_token_ids=[END, 258, 259],
            **asked | {"seed": seed},
        )
        *text, end = reply.json()["choices"][0]["token_ids"]
        assert end == END
        assert 258 in text  # before a call the end is held back
        assert len(text) < 49


def test_flat_form(client):
    xargs = {"length_target": 17, "length_tolerance": 0.0}
    assert tokens(complete(client, vllm_xargs=xargs)) == 17


def test_chat_and_stream(client):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "length_target": {"tokens": 12, "tolerance": 0.0},
    }
    assert tokens(client.post("/v1/chat/completions", json=body)) == 12
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    text = client.post("/v1/chat/completions", json=body).text
    assert '"completion_tokens":12' in text.replace(" ", "")


def test_responses(client):
    target = {"tokens": 9, "tolerance": 0.0}
    body = {"model": "tiny", "input": "hi", "length_target": target, "max_output_tokens": 50}
    reply = client.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["output_tokens"] == 9


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"length_target": 0}, "length_target.tokens"),
        ({"length_target": {"tokens": 1, "tolerance": 0}}, "length_target.tokens: 1"),
        ({"length_target": {"mode": "at_most", "tokens": 1}}, "length_target.tokens: 1"),
        ({"length_target": 100, "max_tokens": 89}, "max_tokens: 89"),
        ({"length_target": 300, "max_tokens": None}, "max_tokens: 16"),
        ({"length_target": {"tokens": 5, "tolerence": 0}}, "length_target.tolerence"),
        ({"length_target": {"mode": "near", "tokens": 5}}, "length_target.mode"),
        ({"length_taget": 5}, "length_taget"),
        ({"vllm_xargs": {"length_goal": 5}}, "length_goal"),
        ({"length_target": 300}, "max_tokens"),
        ({"length_target": 50, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_wrong_fields_are_a_400_that_names_them(client, fields, named):
    reply = complete(client, **fields)
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]


def test_the_log_says_once_that_there_are_no_values(pair):
    for _ in range(3):
        complete(pair.client, length_target=20)
    assert pair.log.read_text().count("requests go on without them") == 1

"""Every kind of request against one real `vllm serve` and one real value server, both tiny.

The model is random, so texts are noise and steering is not judged here: lengths are those of
the guard rails, wrong requests are a 400, and nothing of it is a 500.
"""

import itertools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.pairs import Pair
from tests.support.tiny import tiny_tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.pair("tiny")]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
BATCH = "/v1/chat/completions/batch"
ASK = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60},
    TEXT: {"prompt": "hi", "max_tokens": 60},
    RESPONSES: {"input": "hi", "max_output_tokens": 60},
    MESSAGES: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60},
}
# target: the lengths that its rails allow, within the 60 of the requests
TARGETS: list[tuple[Any, range]] = [
    (20, range(18, 23)),
    ({"tokens": 12, "tolerance": 0.0}, range(12, 13)),
    ({"tokens": 12, "tolerance": 0.0, "policy": "greedy"}, range(12, 13)),
    ({"mode": "at_most", "tokens": 15}, range(1, 16)),
    ({"mode": "at_least", "tokens": 25}, range(25, 61)),
    ({"mode": "range", "min_tokens": 10, "max_tokens": 14}, range(10, 15)),
    ({"mode": "tilt", "beta": -5.0}, range(1, 61)),
    ({"tokens": 20, "min_entropy": 1.0, "every": 3}, range(18, 23)),
    ({"tokens": 30, "tolerance": None}, range(1, 61)),
]
SAMPLING = [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.95, "seed": 3}]
LETTERS = {"structured_outputs": {"regex": "[a-z]*"}}


@pytest.fixture
def client(pair: Pair) -> Iterator[httpx.Client]:
    """Hardly a row of the test lacks its values: endings that are hung up on may."""
    before = figures(pair.client)
    yield pair.client
    now = figures(pair.client)
    rows, valued = (now[name] - before[name] for name in ("rows", "valued_rows"))
    assert valued >= 0.9 * rows


def figures(client: httpx.Client) -> dict[str, float]:
    """The plugin's, as vLLM tells them."""
    text = client.get("/metrics").text
    return {k: float(v) for k, v in re.findall(r"^lenvm_(\w+)_total (\S+)$", text, re.MULTILINE)}


def post(client: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    return client.post(path, json={"model": "tiny", **ASK[path], **fields})


def post_all(client: httpx.Client, asked: list[tuple[str, dict[str, Any]]]) -> list[httpx.Response]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda one: post(client, one[0], **one[1]), asked))


def length(reply: httpx.Response) -> int:
    """Completion tokens, streamed or not."""
    assert reply.status_code == 200, reply.text
    # The last usage of a stream is the one of the whole text.
    return int(re.findall(r'"(?:completion|output)_tokens":\s*(\d+)', reply.text)[-1])


def text_of(reply: httpx.Response) -> str:
    (choice,) = reply.json()["choices"]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def streamed(path: str) -> dict[str, Any]:
    options = {"stream_options": {"include_usage": True}} if path in (CHAT, TEXT) else {}
    return {"stream": True} | options


def preemptions(client: httpx.Client) -> float:
    found = re.findall(r"^vllm:num_preemptions_total{.*} (\S+)$", client.get("/metrics").text, re.M)
    return sum(map(float, found))


def test_every_mode_on_every_endpoint(client):
    """Streamed or not, under a grammar or not, greedy or seeded, and preempted."""
    cells = [
        (path, {"length_target": target} | sampling | stream | grammar, lengths)
        for path in ASK
        for (target, lengths), sampling in itertools.product(TARGETS, SAMPLING)
        for stream, grammar in itertools.product(({}, streamed(path)), ({}, LETTERS))
        if not (path == MESSAGES and ("seed" in sampling or grammar))  # it has no such fields
    ]
    before = preemptions(client)
    replies = post_all(client, [(path, fields) for path, fields, _ in cells])
    for (path, fields, lengths), reply in zip(cells, replies, strict=True):
        assert length(reply) in lengths, (path, fields, reply.text)
    assert preemptions(client) > before + 20


def test_a_batch_of_conversations(client):
    conversations = [ASK[CHAT]["messages"], ASK[CHAT]["messages"]]
    body = {"model": "tiny", "messages": conversations, "max_tokens": 60, "length_target": 0}
    assert client.post(BATCH, json=body).status_code == 400
    body["length_target"] = {"tokens": 9, "tolerance": 0.0}
    assert length(client.post(BATCH, json=body)) == 18


def test_messages_with_sampling(client):
    assert length(post(client, MESSAGES, length_target=9, temperature=1.0, top_p=0.9)) == 9


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_best_of_several_answers(client, path):
    """Of five random texts the nearest: what they are without best_of, given as choices."""
    target, fields = {"tokens": 20, "tolerance": 0.5}, {"temperature": 1.0, "seed": 7}
    one = target | {"endings": 1}
    found = post(client, path, length_target=one, n=5, **fields)
    reply = post(client, path, length_target=target | {"best_of": 5}, **fields)
    assert text_of(reply) in [
        c["text"] if path == TEXT else c["message"]["content"] for c in found.json()["choices"]
    ]
    assert reply.headers["lenvm-sampled-tokens"] == str(length(found))
    assert length(reply) in range(10, 31)
    two = post(client, path, length_target=target | {"best_of": 5}, n=2, **fields)
    assert [choice["index"] for choice in two.json()["choices"]] == [0, 1]
    assert post(client, path, length_target={"tokens": 20, "best_of": 5}, n=6).status_code == 400


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_other_endings(client, path):
    """Of letters, since random bytes are no text that could be continued, and with an end that is
    never natural: one round or two are sampled."""
    target = {"tokens": 50, "tolerance": 0.2, "endings": 8}
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    letters: dict[str, Any] = {"allowed_token_ids": [*tokenizer.encode("abcdefghijklmnop"), end]}
    letters["logit_bias"] = {str(end): -3.0}
    asked = {"temperature": 1.0, "return_token_ids": True, **letters}
    reply = post(client, path, length_target=target, **asked)
    assert length(reply) in range(40, 61)
    assert int(reply.headers["lenvm-sampled-tokens"]) > length(reply) + 4 * 10
    (choice,) = reply.json()["choices"]
    assert len(choice["token_ids"]) == length(reply)
    assert tokenizer.decode(choice["token_ids"][:-1]) == text_of(reply)
    assert choice["logprobs"] is None
    usage = reply.json()["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + length(reply)
    assert choice["length_result"]["endings"] in (5, 8)
    one = post(client, path, length_target=target | {"endings": 1}, temperature=1.0)
    assert "lenvm-sampled-tokens" not in one.headers
    greedy = post(client, path, length_target=50, temperature=0)
    assert "lenvm-sampled-tokens" not in greedy.headers


def test_a_prefix_counts(client):
    """Of 30 tokens 10 are the prompt's."""
    ids = client.post("/tokenize", json={"model": "tiny", "prompt": "a" * 40}).json()["tokens"][:10]
    target = {"tokens": 30, "tolerance": 0, "prefix_tokens": len(ids)}
    reply = post(client, TEXT, prompt=ids, length_target=target)
    assert length(reply) == 30 - len(ids)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_grammar_and_a_target(client, path):
    """The target decides where the grammar leaves a choice, and the grammar where it does not."""
    exact = {"tokens": 12, "tolerance": 0.0}
    cells = [
        ({"structured_outputs": {"regex": "[a-z]*"}}, r"[a-z]{11}", 12),
        ({"structured_outputs": {"regex": "[a-z]{20}"}}, r"[a-z]{20}", 21),
        ({"structured_outputs": {"regex": "[a-z]{3}"}}, r"[a-z]{3}", 4),
    ]
    for grammar, text, tokens in cells:
        for sampling in SAMPLING:
            reply = post(client, path, length_target=exact, **grammar, **sampling)
            assert length(reply) == tokens, reply.text
            assert re.fullmatch(text, text_of(reply))


def test_a_json_schema_and_a_target(client):
    properties = {"a": {"type": "string", "maxLength": 20}}
    schema = {"type": "object", "properties": properties, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    reply = post(
        client, CHAT, length_target={"mode": "at_least", "tokens": 20}, response_format=form
    )
    assert length(reply) <= 60
    if reply.json()["choices"][0]["finish_reason"] == "stop":
        assert list(json.loads(text_of(reply), strict=False)) == ["a"]


def test_what_else_a_request_may_ask_for(client):
    exact = {"length_target": {"tokens": 10, "tolerance": 0.0}}
    end = 256
    allowed = [*range(97, 123), end]
    cells = [
        {"logit_bias": {"97": 5.0, "98": -100.0}},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"allowed_token_ids": allowed},
        {"min_tokens": 9},
        {"stop_token_ids": [65]},
        {"logprobs": 3},
    ]
    for fields, reply in zip(
        cells, post_all(client, [(TEXT, exact | fields) for fields in cells]), strict=True
    ):
        assert length(reply) == 10, fields
    samples = post(client, TEXT, n=4, seed=1, temperature=1.0, **exact)
    assert length(samples) == 40
    assert len(samples.json()["choices"]) == 4
    several = post(client, TEXT, **exact | {"prompt": ["a", "bc", "def"]})
    assert length(several) == 30


def test_a_seed_gives_the_same_text_again(client):
    asked = {"length_target": 20, "temperature": 1.0}
    same, again, other = (text_of(post(client, TEXT, **asked, seed=seed)) for seed in (3, 3, 4))
    assert same == again != other


def test_logprobs_are_the_models_own(client):
    """Of a greedy text that the target has changed, as without one; so is the best of several."""
    asked = {"logprobs": 0, "temperature": 0.0, "return_token_ids": True}
    target = {"tokens": 20, "tolerance": 0.0, "policy": "greedy"}
    (guided,) = post(client, TEXT, **asked, length_target=target).json()["choices"]
    (plain,) = post(client, TEXT, **asked).json()["choices"]
    assert guided["token_ids"] != plain["token_ids"]
    prompt = [*guided["prompt_token_ids"], *guided["token_ids"]]
    scored = {"prompt": prompt, "echo": True, "max_tokens": 1, "logprobs": 0}
    (read,) = post(client, TEXT, **scored).json()["choices"]
    own = read["logprobs"]["token_logprobs"][len(guided["prompt_token_ids"]) :][:20]
    assert guided["logprobs"]["token_logprobs"] == pytest.approx(own, abs=1e-3)

    several = post(client, TEXT, **asked | {"n": 4, "temperature": 1.0}, length_target=20)
    sums = [sum(choice["logprobs"]["token_logprobs"]) for choice in several.json()["choices"]]
    assert len(sums) == 4
    assert -1000 < min(sums) <= max(sums) < 0


def test_text_that_stops_by_a_string_or_a_token(client):
    """Either may end it before its rails; a stop token counts as an end, a string cannot."""
    stop = {"stop": ["a", "e", "i", "o"], "temperature": 1.0, "seed": 5}
    assert length(post(client, TEXT, length_target=40, **stop)) <= 44
    every_letter = {"stop_token_ids": list(range(97, 123)), "temperature": 1.0, "seed": 5}
    exact = {"tokens": 10, "tolerance": 0.0}
    reply = post(client, TEXT, length_target=exact, **every_letter)
    assert length(reply) == 10
    assert reply.json()["choices"][0]["finish_reason"] == "stop"


def test_metrics_beside_vllms_own(client):
    """The engine counts in another process than the one that answers."""
    assert "vllm:generation_tokens_total" in client.get("/metrics").text
    before = figures(client)
    asked = {"length_target": {"tokens": 20, "tolerance": 0.0, "endings": 1}}
    post_all(client, [(CHAT, asked)] * 10)
    seen = {name: value - before[name] for name, value in figures(client).items()}
    assert seen["finished"] == 10 <= seen["requests"]  # a preempted one begins again
    assert seen["steps"] >= 19  # of the engine, each of several texts
    assert 0 < seen["value_seconds"] < seen["plan_seconds"]


LIMIT = ""  # stands for the name that a limit has on the route, the last one in ASK
WRONG = [
    (0, "length_target.tokens"),
    (-3, "length_target.tokens"),
    ("20 words", "length_target"),
    (True, "length_target"),
    ([20], "length_target"),
    ({}, "length_target.tokens"),
    ({"tokens": 20.5}, "length_target.tokens"),
    ({"tokens": 2**40}, "length_target.tokens"),
    ({"mode": "near", "tokens": 5}, "length_target.mode"),
    ({"mode": "tilt"}, "length_target.beta"),
    ({"mode": "tilt", "beta": "strong"}, "length_target.beta"),
    ({"mode": "tilt", "beta": 1.0, "tokens": 5}, "length_target.tokens"),
    ({"tokens": 5, "beta": 1.0}, "length_target.beta"),
    ({"tokens": 5, "tolerance": -0.5}, "length_target.tolerance"),
    ({"tokens": 5, "policy": "magic"}, "length_target.policy"),
    ({"tokens": 5, "max_kl": -1}, "length_target.max_kl"),
    ({"mode": "range", "tokens": 5}, "length_target.tokens"),
    ({"mode": "range", "min_tokens": 5}, "length_target.max_tokens"),
    ({"mode": "range", "min_tokens": 6, "max_tokens": 5}, "length_target.min_tokens"),
    ({"mode": "range", "min_tokens": 61, "max_tokens": 70}, LIMIT),
    ({"tokens": 5, "every": 0}, "length_target.every"),
    ({"tokens": 5, "min_entropy": -1.0}, "length_target.min_entropy"),
    ({"tokens": 5, "scope": "answer"}, "length_target.scope"),
    ({"tokens": 5, "scope": "summary"}, "length_target.scope"),
    ({"tokens": 5, "tokenz": 6}, "length_target.tokenz"),
    ({"tokens": 100}, LIMIT),
    ({"mode": "at_least", "tokens": 61}, LIMIT),
]
CONTRADICTIONS = [
    ({"length_target": 20, "min_tokens": 30}, "min_tokens"),
    ({"length_target": {"mode": "at_most", "tokens": 20}, "min_tokens": 21}, "min_tokens"),
    ({"length_target": 20, "ignore_eos": True}, "ignore_eos"),
    ({"length_target": 20, "use_beam_search": True, "n": 2}, "use_beam_search"),
    ({"length_target": 20, "vllm_xargs": {"length_mode": "tilt"}}, "vllm_xargs.length_mode"),
    ({"vllm_xargs": {"length_target": 0}}, "length_target.tokens"),
    ({"vllm_xargs": {"length_goal": 5}}, "length_goal"),
    ({"length_goal": 5}, "length_goal"),
]


def test_limits_that_nobody_set(client):
    """A text completion has 16 tokens, the rest the model's context; a stream is told so, too."""
    for path, fields in ((TEXT, {"length_target": 40}), (CHAT, {"length_target": 600})):
        body = {"model": "tiny", **ASK[path], "max_tokens": None, **fields}
        for more in ({}, streamed(path)):
            reply = client.post(path, json=body | more)
            assert reply.status_code == 400, reply.text
    body = {"model": "tiny", **ASK[CHAT], "max_tokens": None, "length_target": 40}
    assert length(client.post(CHAT, json=body)) in range(36, 45)


def test_what_is_wrong_is_a_400_that_names_it(client):
    wrong = [
        (path, {"length_target": value}, name or [*ASK[path]][-1])
        for path in ASK
        for value, name in WRONG
    ]
    wrong += [(path, fields, name) for path in (CHAT, TEXT) for fields, name in CONTRADICTIONS]
    wrong += [(path, fields | streamed(path), name) for path, fields, name in wrong]
    replies = post_all(client, [(path, fields) for path, fields, _ in wrong])
    for (path, fields, name), reply in zip(wrong, replies, strict=True):
        assert reply.status_code == 400, (path, fields, reply.status_code, reply.text)
        assert name in reply.text, (path, fields, reply.text)
    assert length(post(client, CHAT, length_target={"tokens": 7, "tolerance": 0.0})) == 7


def test_what_writes_no_text_is_left_alone(client: httpx.Client) -> None:
    scoring = {"model": "tiny", "query": "a", "items": ["b"], "label_token_ids": [97, 98]}
    assert client.post("/generative_scoring", json=scoring).status_code == 200

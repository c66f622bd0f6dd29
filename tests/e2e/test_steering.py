"""A real `vllm serve` with the real small model, steered by a real value server that may die."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from lenvm_vllm.commands.demo import MODEL, NAME
from lenvm_vllm.commands.demo.questions import PROMPTS
from tests.e2e.pairs import Pair
from tests.support.servers import vllm_serve
from value_server.contract.units import WORDS, count

pytestmark = [pytest.mark.e2e, pytest.mark.pair("small")]
MESSAGES = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


class Small:
    """The pair, and what its tests ask of it."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def ask(self, messages: Any = MESSAGES[0], **fields: Any) -> dict[str, Any]:
        return ask(self.pair.client, messages, **fields)

    def ask_all(self, messages: list[Any], **fields: Any) -> list[dict[str, Any]]:
        """One request a message, all at the same time."""
        with ThreadPoolExecutor(len(messages)) as pool:
            return list(pool.map(lambda m: self.ask(m, **fields), messages))

    def finished(self) -> float:
        """Requests that vLLM has answered, other endings of theirs included."""
        return total(self.pair.client, "vllm:request_success_total")

    def written(self) -> float:
        """Tokens that vLLM has generated."""
        return total(self.pair.client, "vllm:generation_tokens_total")

    def scored(self) -> float:
        """Tokens and candidates that went through the value model."""
        return total(self.pair.values, "lenvm_tokens_forwarded_total")


def total(client: httpx.Client, name: str) -> float:
    """Of a metric, over its labels."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(name))


def ask(client: httpx.Client, messages: Any, **fields: Any) -> dict[str, Any]:
    """One chat completion with token ids."""
    body = {"model": NAME, "messages": messages, "max_tokens": 200, "seed": 1, "top_k": 15}
    reply = client.post("/v1/chat/completions", json=body | {"return_token_ids": True} | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def tokens(reply: dict[str, Any]) -> int:
    return int(reply["usage"]["completion_tokens"])


@pytest.fixture
def small(pair: Pair) -> Small:
    return Small(pair)


@pytest.fixture(scope="module")
def plain_texts(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Token ids of the prompts' answers from a vLLM that knows nothing of the plugin."""
    log, flags = tmp_path_factory.mktemp("plain") / "log", ("--served-model-name", NAME)
    with (
        vllm_serve(MODEL, log, *flags, env={"VLLM_PLUGINS": ""}) as url,
        httpx.Client(base_url=url, timeout=300, trust_env=False) as client,
        ThreadPoolExecutor(len(MESSAGES)) as pool,
    ):
        replies = list(pool.map(lambda m: ask(client, m, max_tokens=60), MESSAGES))
    return [reply["choices"][0]["token_ids"] for reply in replies]


def test_unguided_rows_are_those_of_plain_vllm(plain_texts, small):
    """Alone in the batch, and as neighbours of guided requests of every mode."""
    guided = [
        {"tokens": 60, "tolerance": 0.0},
        {"mode": "at_most", "tokens": 50},
        {"mode": "at_least", "tokens": 70},
        {"mode": "tilt", "beta": 5.0},
    ]
    for neighbours in ([], guided):
        wishes = [None] * 4 + neighbours
        with ThreadPoolExecutor(len(wishes)) as pool:
            jobs = [
                pool.submit(small.ask, MESSAGES[i % 4], max_tokens=100 if wish else 60, **field)
                for i, wish in enumerate(wishes)
                for field in [{"length_target": wish} if wish else {}]
            ]
            replies = [job.result() for job in jobs]
        assert [r["choices"][0]["token_ids"] for r in replies[:4]] == plain_texts
    exact, at_most, at_least = map(tokens, replies[4:7])
    assert exact == 60
    assert at_most <= 50
    assert at_least >= 70


def test_steered_lengths_without_rails(small):
    """The shipped value model is weak: the direction, over sixteen texts each, is what it has."""
    mean = {}
    for target in (30, 150):
        replies = small.ask_all(MESSAGES * 4, length_target={"tokens": target, "tolerance": None})
        mean[target] = sum(map(tokens, replies)) / len(replies)
    assert mean[150] > mean[30]


def test_sign_of_beta(small):
    short, long = (
        sum(map(tokens, small.ask_all(MESSAGES, length_target={"mode": "tilt", "beta": beta})))
        for beta in (-30.0, 30.0)
    )
    assert short < long


def test_one_call_scores_all_rows_of_a_step(small):
    before = total(small.pair.values, "lenvm_step_seconds_count")
    small.ask_all(MESSAGES * 2, length_target={"tokens": 40, "tolerance": 0.0, "endings": 1})
    assert total(small.pair.values, "lenvm_step_seconds_count") - before < 8 * 40 / 2


def test_value_server_killed_while_sixteen_run(small):
    """Twelve count tokens and four words."""
    pair, wish = small.pair, {"tokens": 80, "tolerance": 0.1}
    wishes = [wish] * 12 + [{"words": 60, "tolerance": 0.1}] * 4
    before, finished = small.written(), small.finished()

    def kill_when_all_run() -> bool:
        deadline = time.monotonic() + 120
        while small.written() < before + 16 * 30:  # none of them has ended
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        pair.kill_values()
        return True

    with ThreadPoolExecutor(17) as pool:
        killed = pool.submit(kill_when_all_run)
        asked = [
            pool.submit(small.ask, messages, length_target=wish)
            for messages, wish in zip(MESSAGES * 4, wishes, strict=True)
        ]
        replies = [one.result() for one in asked]
        assert killed.result()
    assert all(72 <= tokens(reply) <= 88 for reply in replies[:12])
    for (choice,) in (reply["choices"] for reply in replies[12:]):
        assert 54 <= count(choice["message"]["content"], WORDS) <= 66
    for (choice,) in (reply["choices"] for reply in replies):
        told = choice["length_result"]
        cut = told["forced"] and told["end"] == "cut"
        assert choice["finish_reason"] == ("length" if cut else "stop")
        assert 0 < told["steered_steps"] < told["steps"]
    assert small.finished() == finished + 16  # nothing is asked again while there are no values
    assert pair.said().count("requests go on without them") == 1

    pair.revive_values()
    before = small.scored()
    assert 72 <= tokens(small.ask(length_target=wish)) <= 88
    assert small.scored() > before + 80
    assert pair.said().count("requests are steered again") == 1

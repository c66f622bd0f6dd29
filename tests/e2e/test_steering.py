"""A real `vllm serve` with the real small model, steered by a real value server that may die."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from lenvm_vllm.commands.demo import CHECKPOINT, MODEL
from lenvm_vllm.commands.demo.answers import PROMPTS
from lenvm_vllm.commands.processes import free_port
from tests.support.servers import value_serve, vllm_serve

pytestmark = pytest.mark.e2e
MESSAGES = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


@dataclass
class Pair:
    """A guided vLLM and its value server, which the tests may kill and start again."""

    client: httpx.Client
    values: httpx.Client
    log: Path
    start_values: Callable[[], int]
    pid: int

    def ask(self, messages: Any = MESSAGES[0], **fields: Any) -> dict[str, Any]:
        return ask(self.client, messages, **fields)

    def ask_all(self, messages: list[Any], **fields: Any) -> list[dict[str, Any]]:
        """One request a message, all at the same time."""
        with ThreadPoolExecutor(len(messages)) as pool:
            return list(pool.map(lambda m: self.ask(m, **fields), messages))

    def finished(self) -> float:
        """Requests that vLLM has answered, other endings of theirs included."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[1])
            for line in lines
            if line.startswith("vllm:request_success_total")
        )

    def scored(self) -> float:
        """Tokens and candidates that went through the value model."""
        lines = self.values.get("/metrics").text.splitlines()
        (line,) = (line for line in lines if line.startswith("lenvm_tokens_forwarded_total "))
        return float(line.split()[1])


def ask(client: httpx.Client, messages: Any, **fields: Any) -> dict[str, Any]:
    """One chat completion with token ids."""
    body = {"model": "tiny", "messages": messages, "max_tokens": 200, "seed": 1, "top_k": 15}
    reply = client.post("/v1/chat/completions", json=body | {"return_token_ids": True} | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def tokens(reply: dict[str, Any]) -> int:
    return int(reply["usage"]["completion_tokens"])


def connect(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=300, trust_env=False)


@pytest.fixture(scope="module")
def plain_texts(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Token ids of the prompts' answers from a vLLM that knows nothing of the plugin."""
    log = tmp_path_factory.mktemp("plain") / "log"
    env = {"VLLM_PLUGINS": ""}
    with (
        vllm_serve(MODEL, log, env=env) as url,
        connect(url) as client,
        ThreadPoolExecutor(len(MESSAGES)) as pool,
    ):
        replies = list(pool.map(lambda m: ask(client, m, max_tokens=60), MESSAGES))
    return [reply["choices"][0]["token_ids"] for reply in replies]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("guided")
    port = free_port()
    value_url = f"http://127.0.0.1:{port}"
    flag = ("--logits-processors", "lenvm_vllm:LenvmLogitsProcessor")
    with contextlib.ExitStack() as servers:

        def start_values() -> int:
            log = folder / "values.log"
            return servers.enter_context(value_serve(CHECKPOINT, MODEL, log, port))

        pid = start_values()
        env = {"LENVM_URL": value_url}
        url = servers.enter_context(vllm_serve(MODEL, folder / "log", *flag, env=env))
        clients = servers.enter_context(connect(url)), servers.enter_context(connect(value_url))
        yield Pair(*clients, folder / "log", start_values, pid)


def test_unguided_rows_are_those_of_plain_vllm(plain_texts, pair):
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
                pool.submit(pair.ask, MESSAGES[i % 4], max_tokens=100 if wish else 60, **field)
                for i, wish in enumerate(wishes)
                for field in [{"length_target": wish} if wish else {}]
            ]
            replies = [job.result() for job in jobs]
        assert [r["choices"][0]["token_ids"] for r in replies[:4]] == plain_texts
    exact, at_most, at_least = map(tokens, replies[4:7])
    assert exact == 60
    assert at_most <= 50
    assert at_least >= 70


def test_steered_lengths_without_rails(pair):
    """The shipped value model is weak: the direction, over sixteen texts each, is what it has."""
    mean = {}
    for target in (30, 150):
        replies = pair.ask_all(MESSAGES * 4, length_target={"tokens": target, "tolerance": None})
        mean[target] = sum(map(tokens, replies)) / len(replies)
    assert mean[150] > mean[30]


def test_sign_of_beta(pair):
    short, long = (
        sum(map(tokens, pair.ask_all(MESSAGES, length_target={"mode": "tilt", "beta": beta})))
        for beta in (-30.0, 30.0)
    )
    assert short < long


def test_one_call_scores_all_rows_of_a_step(pair):
    before = pair.values.get("/metrics").text
    pair.ask_all(MESSAGES * 2, length_target={"tokens": 40, "tolerance": 0.0, "endings": 1})
    calls = [
        float(line.split()[1])
        for text in (before, pair.values.get("/metrics").text)
        for line in text.splitlines()
        if line.startswith("lenvm_step_seconds_count")
    ]
    assert calls[1] - calls[0] < 8 * 40 / 2


def test_value_server_killed_while_sixteen_run(pair):
    wish = {"tokens": 80, "tolerance": 0.1}
    before, finished = pair.scored(), pair.finished()

    def kill_when_all_run() -> bool:
        deadline = time.monotonic() + 120
        while pair.scored() < before + 16 * 40:  # prompts count too: before half of the answers
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        os.kill(pair.pid, signal.SIGKILL)
        return True

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_when_all_run)
        replies = pair.ask_all(MESSAGES * 4, length_target=wish)
        assert killed.result()
    assert all(72 <= tokens(reply) <= 88 for reply in replies)
    for (choice,) in (reply["choices"] for reply in replies):
        told = choice["length_result"]
        cut = told["forced"] and told["end"] == "cut"
        assert choice["finish_reason"] == ("length" if cut else "stop")
        assert 0 < told["steered_steps"] < told["steps"]
    assert pair.finished() == finished + 16  # nothing is asked again while there are no values
    assert pair.log.read_text().count("requests go on with guard rails only") == 1

    pair.pid = pair.start_values()
    time.sleep(5.5)  # the longest pause of the client's circuit breaker
    before = pair.scored()
    assert 72 <= tokens(pair.ask(length_target=wish)) <= 88
    assert pair.scored() > before + 80
    assert pair.log.read_text().count("requests are steered again") == 1

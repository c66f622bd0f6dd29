"""Rollouts from a server that answers a prompt with its own bytes."""

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.prompts import PROMPTS, many
from tests.support.tiny import tiny_tokenizer
from trainer.rollout_files import TokenizerOf, read_rollouts
from trainer.rollouts.rollout import rollout
from trainer.rollouts.samplers import Engine, Sampling, ServerSampler
from value_server.contract.checkpoint import tokenizer_fingerprint

SAMPLING = Sampling(n=2, temperature=1.0, top_p=1.0, max_tokens=9)


def server(
    *answers: httpx.Response | Exception, root: str | None = None
) -> tuple[ServerSampler, list[dict[str, Any]]]:
    """A sampler whose server gives these answers in turn, then completions; and its requests.

    root: where it says that its model lies.
    """
    requests: list[dict[str, Any]] = []
    queue = list(answers)

    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "m", "root": root}]})
        body = json.loads(request.content)
        requests.append({"path": request.url.path, "key": request.headers["authorization"]} | body)
        if queue:
            answer = queue.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        text = body["messages"][0]["content"]
        choices = [
            {"token_ids": [*text.encode(), k], "finish_reason": "stop"} for k in range(body["n"])
        ]
        return httpx.Response(200, json={"prompt_token_ids": [1, 2], "choices": choices})

    sampler = ServerSampler(
        "http://host/v1/", "m", api_key="k", concurrency=3, transport=httpx.MockTransport(handle)
    )
    sampler.pause = 0
    return sampler, requests


def test_a_server_is_asked_for_token_ids() -> None:
    sampler, requests = server()
    sampled = sampler.sample(PROMPTS, SAMPLING)
    assert [s and s.prompt_ids for s in sampled] == [[1, 2]] * 3
    assert [s and s.completions for s in sampled] == [
        [([*prompt.text.encode(), k], "stop") for k in range(2)] for prompt in PROMPTS
    ]
    for request in requests:
        assert (request["path"], request["key"]) == ("/v1/chat/completions", "Bearer k")
        assert request["return_token_ids"] is True
        assert (request["n"], request["max_tokens"], request["model"]) == (2, 9, "m")
        assert (request["top_k"], request["repetition_penalty"]) == (0, 1.0)


def test_passing_failures_are_repeated() -> None:
    failures = [httpx.Response(503), httpx.ConnectError("refused"), httpx.Response(429)]
    sampler, requests = server(*failures)
    assert len(sampler.sample(PROMPTS[:1], SAMPLING)) == 1
    assert len(requests) == 4


@pytest.mark.parametrize(
    "text",
    [
        "This model's maximum context length is 9 tokens. However, your prompt ...",
        "max_tokens must be at least 1, got 0.",  # to a prompt of just as many
    ],
)
def test_a_server_that_finds_a_prompt_too_long(text: str) -> None:
    sampler, requests = server(httpx.Response(400, text=text))
    sampler.concurrency = 1
    first, second = sampler.sample(PROMPTS[:2], SAMPLING)
    assert first is None
    assert second is not None
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("answers", "message", "calls"),
    [
        ([httpx.Response(400, text="no such model")], "400 no such model", 1),
        ([httpx.Response(500, text="oom")] * 4, "500 oom", 4),
        ([httpx.ReadTimeout("slow")] * 4, "ReadTimeout", 4),
        (
            [httpx.Response(200, json={"choices": [{"finish_reason": "stop"}]})],
            "without token ids; it has to know return_token_ids",
            1,
        ),
    ],
)
def test_what_a_server_cannot_do_is_named(answers: list[Any], message: str, calls: int) -> None:
    sampler, requests = server(*answers)
    with pytest.raises(ValueError, match=rf"^server: http://host/v1/.*{message}"):
        sampler.sample(PROMPTS[:1], SAMPLING)
    assert len(requests) == calls


def test_rollouts_from_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is not even imported."""
    sampler, requests = server()
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(
        "trainer.rollouts.samplers.ServerSampler", lambda *_args, **_options: sampler
    )
    engine = Engine(server="http://host/v1")
    rollout(many(tmp_path), tmp_path / "out", model="m", engine=engine, shard_size=4)
    assert len(requests) == 10
    assert len(read_rollouts(tmp_path / "out")) == 20


def test_what_is_no_url_is_named_before_anything_is_asked() -> None:
    for server in ("127.0.0.1:8000/v1", "host", ""):
        with pytest.raises(ValueError, match=rf"^server: '{server}', must be a URL"):
            Engine(server=server).check()
    Engine(server="https://host/v1").check()


def test_a_server_tells_its_tokenizer(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    told = TokenizerOf(str(tmp_path), tokenizer_fingerprint(tiny_tokenizer()))
    sampler, _ = server(root=str(tmp_path))
    assert sampler.tokenizer() == told
    unknown, _ = server()
    assert unknown.tokenizer() is None
    unknown.source = str(tmp_path)
    assert unknown.tokenizer() == told
    unknown.source = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"^tokenizer: .*nothing' does not load"):
        unknown.tokenizer()

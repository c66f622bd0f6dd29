"""Several engines on one value server: one of two tensor-parallel ranks, and one that has little
memory, prefills in small chunks, thinks and serves a LoRA adapter. All models are tiny and random.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.systems.timing import wait_until
from lenvm_vllm.commands.processes import free_port
from tests.support.servers import BARE_FLAG, WAITS, value_serve, vllm_serve
from tests.support.tiny import THINKING, tiny_checkpoint
from tests.support.tiny_llm import tiny_llm

pytestmark = pytest.mark.e2e

TWO_RANKS = ("-tp", "2", "--distributed-executor-backend", "mp")
LITTLE = (
    *("--block-size", "32", "--num-gpu-blocks-override", "20", "--max-num-batched-tokens", "64"),
    *("--enable-lora", "--max-lora-rank", "8", "--reasoning-parser", "deepseek_r1"),
)
THINK, MARKER = 258, 259
IN_IT, BEFORE_IT = "<think>hm", "<think>hm</think>"
WHOLE = {"scope": "completion"}  # one of the engines has another default
OFFLINE = """
import json, sys
from vllm import LLM, SamplingParams

llm = LLM(
    sys.argv[1], logits_processors=["lenvm_vllm"], dtype="float32", enforce_eager=True,
    max_model_len=512, additional_config={"lenvm": {"url": sys.argv[2]}},
)
plain = SamplingParams(max_tokens=60)
exact = plain.clone()
exact.extra_args = {"length_target": 23, "length_tolerance": 0.0}
outputs = llm.generate(["hello", "hello"], [exact, plain], use_tqdm=False)
print(json.dumps([len(output.outputs[0].token_ids) for output in outputs]))
"""


@dataclass
class Engines:
    """Clients of both engines and of their value server, and what they log."""

    two_ranks: httpx.Client
    little: httpx.Client
    values: httpx.Client
    url: str
    folder: Path

    def logs(self) -> str:
        return "".join((self.folder / name).read_text() for name in ("two.log", "little.log"))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("engines")
    checkpoint = tiny_checkpoint(folder / "value", more=THINKING)
    model = tiny_llm(folder / "model", more=THINKING)
    adapter = tiny_adapter(model, folder / "adapter")
    url = f"http://127.0.0.1:{(port := free_port())}"
    env = WAITS | {"LENVM_URL": url}
    own = f"own={tiny_checkpoint(folder / 'own-value', seed=1, more=THINKING)}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(value_serve(checkpoint, model, folder / "values.log", port, own))
        two = vllm_serve(
            *(model, folder / "two.log", *BARE_FLAG, *TWO_RANKS),
            env=env | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        )
        little = vllm_serve(
            *(model, folder / "little.log", *BARE_FLAG, *LITTLE),
            *("--lora-modules", f"tuned={adapter}", f"own={adapter}"),
            *("--scheduling-policy", "priority"),
            env=env
            | {
                "LENVM_FORECAST": "true",
                "LENVM_ADAPTERS": json.dumps({"own": f"{url}/models/own"}),
            },
        )
        urls = stack.enter_context(two), stack.enter_context(little), url
        clients = [
            stack.enter_context(httpx.Client(base_url=u, timeout=120, trust_env=False))
            for u in urls
        ]
        yield Engines(*clients, url, folder)


def tiny_adapter(model: Path, folder: Path) -> Path:
    """A LoRA adapter that changes what `model` says; returns `folder`."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return folder


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 200}
    body |= {"temperature": 0.0, "logit_bias": {str(THINK): -100.0}}  # begins no thinking
    reply = client.post("/v1/completions", json=body | {"return_token_ids": True} | fields)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def chat(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    """Goes on with a thinking that has begun."""
    words = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": IN_IT}]
    body = {"model": "tiny", "messages": words, "max_tokens": 60, "return_token_ids": True}
    body |= {"add_generation_prompt": False, "continue_final_message": True}
    body |= {"skip_special_tokens": False}  # the markers are, here
    reply = client.post("/v1/chat/completions", json=body | fields)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def ids(reply: dict[str, Any]) -> list[int]:
    return list(reply["choices"][0]["token_ids"])


def metric(client: httpx.Client, name: str) -> float:
    found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))


def test_ranks_sample_the_same_and_as_one_engine_does(engines: Engines) -> None:
    """Ranks that disagreed would write nonsense, or wait for each other for ever."""
    asked: list[dict[str, Any]] = [
        {"length_target": WHOLE | {"tokens": 60, "tolerance": None}},
        {"length_target": WHOLE | {"tokens": 30, "tolerance": 0.0}, "temperature": 1.0, "seed": 4},
        {"length_target": WHOLE | {"mode": "tilt", "beta": 3.0}, "temperature": 1.0, "seed": 5},
        {"max_tokens": 30},
    ]
    with ThreadPoolExecutor(8) as pool:
        two = list(pool.map(lambda fields: complete(engines.two_ranks, **fields), asked))
        one = list(pool.map(lambda fields: complete(engines.little, **fields), asked))
    assert [ids(reply) for reply in two] == [ids(reply) for reply in one]
    assert len(ids(two[1])) == 30
    assert metric(engines.two_ranks, "lenvm_requests_total") == 3  # not once a rank
    assert "no values" not in engines.logs()


def test_engines_share_the_value_server(engines: Engines) -> None:
    before = metric(engines.values, "lenvm_tokens_forwarded_total")
    target = {"tokens": 40, "tolerance": 0.0}
    with ThreadPoolExecutor(16) as pool:
        replies = pool.map(
            lambda i: complete((engines.two_ranks, engines.little)[i % 2], length_target=target),
            range(16),
        )
        assert {len(ids(reply)) for reply in replies} == {40}
    assert metric(engines.values, "lenvm_tokens_forwarded_total") > before
    assert "no values" not in engines.logs()


def test_preempted_requests_are_met(engines: Engines) -> None:
    """640 tokens of memory for 16 requests of 130: vLLM drops some and computes them again."""
    before = metric(engines.little, "vllm:num_preemptions_total")
    with ThreadPoolExecutor(16) as pool:
        replies = pool.map(
            lambda i: complete(
                engines.little,
                prompt=f"{i}: say something long",
                length_target={"tokens": 110, "tolerance": 0.0},
                temperature=1.0,  # no seed: a seeded prompt in chunks kills vLLM's CPU engine
            ),
            range(16),
        )
        assert {len(ids(reply)) for reply in replies} == {110}
    assert metric(engines.little, "vllm:num_preemptions_total") > before
    assert "no values" not in engines.logs()


def test_long_prompt_in_chunks_and_from_the_prefix_cache(engines: Engines) -> None:
    """300 tokens in passes of 64, then from vLLM's cache: the same text, also with two ranks."""
    target = WHOLE | {"tokens": 25, "tolerance": None}
    asked = {"prompt": "once upon a time " * 18, "length_target": target}
    first = complete(engines.little, **asked)
    assert ids(complete(engines.little, **asked)) == ids(first)
    assert ids(complete(engines.two_ranks, **asked)) == ids(first)
    assert metric(engines.little, "vllm:prefix_cache_hits_total") > 0


def test_forecast_in_the_response_header(engines: Engines) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 50}
    for more, expected in (
        ({}, range(1, 51)),
        ({"length_target": WHOLE | {"tokens": 20}}, range(20, 21)),
    ):
        reply = engines.little.post("/v1/completions", json=body | more)
        assert int(reply.headers["lenvm-predicted-tokens"]) in expected
        assert reply.status_code == 200, reply.text
        reply = engines.two_ranks.post("/v1/completions", json=body | more)
        assert "lenvm-predicted-tokens" not in reply.headers


def test_a_stream_tells_how_far_it_is(engines: Engines) -> None:
    """The length to expect before the first token, and with each one how many there are."""
    body = {
        "model": "tiny",
        "prompt": "hello",
        "max_tokens": 50,
        "length_target": WHOLE | {"tokens": 20},
        "logit_bias": {str(THINK): -100.0},
        "stream": True,
    }
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    body["return_token_ids"] = True
    with engines.little.stream("POST", "/v1/completions", json=body) as reply:
        expected = int(reply.headers["lenvm-predicted-tokens"])
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    done = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    came = [sum(len(c.get("token_ids") or ()) for c in chunk["choices"]) for chunk in chunks]
    assert done == [*accumulate(came)]
    assert abs(done[-1] - expected) <= 2
    assert len(set(done)) > 1  # those that wait for a busy API server come together


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 2}])
def test_parts_of_a_text_that_thinks(engines: Engines, sampling: dict[str, Any]) -> None:
    """vLLM's own reasoning parser tells which token ends the thinking."""
    exact = {"tokens": 20, "tolerance": 0.0}
    thinking = {"length_target": exact | {"scope": "thinking"}} | sampling
    thought = ids(complete(engines.little, prompt=IN_IT, **thinking))
    assert thought.index(MARKER) == 19
    assert len(thought) > 20
    reply = chat(engines.little, **thinking)
    assert ids(reply).index(MARKER) == 19
    assert reply["choices"][0]["message"]["reasoning"]
    none = {"length_target": {"tokens": 0, "scope": "thinking"}} | sampling
    assert ids(complete(engines.little, prompt=IN_IT, **none))[0] == MARKER

    answer = {"length_target": exact | {"scope": "answer"}} | sampling
    often = {"logit_bias": {str(MARKER): 8.0}}
    text = ids(complete(engines.little, prompt=IN_IT, **answer, **often))
    assert len(text) - (text.index(MARKER) + 1) == 20
    for prompt in (BEFORE_IT, BEFORE_IT + " and so on, at some length", "hello"):
        assert len(ids(complete(engines.little, prompt=prompt, **answer))) == 20


def test_a_limit_leaves_an_answer_behind_the_thinking(engines: Engines) -> None:
    """The tiny model closes no thinking by itself. By default the answer alone counts."""
    at_most = {"mode": "at_most", "tokens": 24}
    bans = {"logit_bias": {str(token): -100.0 for token in (256, THINK, MARKER)}}
    reply = chat(engines.little, length_target=at_most, **bans)
    # A quarter of the limit is left for the answer; a character that has begun comes first.
    assert 54 <= ids(reply).index(MARKER) + 1 <= 57
    assert reply["choices"][0]["message"]["content"]
    reply = chat(engines.little, length_target=at_most | {"scope": "completion"}, **bans)
    assert 18 <= ids(reply).index(MARKER) + 1 <= 21
    assert 20 <= len(ids(reply)) <= 24  # a line that is finished before it is an end
    assert reply["choices"][0]["message"]["content"]


def test_parts_that_cannot_be(engines: Engines) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 60}
    target: dict[str, Any] = {"length_target": {"tokens": 20, "scope": "thinking"}}
    reply = engines.two_ranks.post("/v1/completions", json=body | target)
    assert (reply.status_code, "length_target.scope" in reply.text) == (400, True), reply.text
    reply = engines.little.post(
        "/v1/completions", json=body | target | {"thinking_token_budget": 9}
    )
    assert (reply.status_code, "thinking_token_budget" in reply.text) == (400, True), reply.text


def test_lora_request(engines: Engines) -> None:
    exact = {"length_target": {"tokens": 30, "tolerance": 0.0}}
    tuned = complete(engines.little, model="tuned", **exact)
    assert len(ids(tuned)) == 30
    assert ids(tuned) != ids(complete(engines.little, **exact))


def test_whose_values_an_adapter_has(engines: Engines) -> None:
    """Those of the base model's value model, unless it has one of its own."""

    def steps() -> list[float]:
        text = engines.values.get("/metrics").text
        lines = ("lenvm_step_seconds_count", 'lenvm_step_seconds_count{model="own"}')
        return [float(text.split(f"\n{line} ")[1].split()[0]) for line in lines]

    for model, mine in (("tuned", 0), ("own", 1)):
        before = steps()
        (choice,) = complete(engines.little, model=model, length_target=30)["choices"]
        assert choice["length_result"]["steered_steps"] > 0
        after = steps()
        assert after[mine] > before[mine] + 10
        # A prompt's end may be told with the next request's first step.
        assert after[1 - mine] <= before[1 - mine] + 1


def test_session_of_a_client_who_hangs_up_is_freed(engines: Engines) -> None:
    body = {
        "model": "tiny",
        "prompt": "hello",
        "max_tokens": 480,
        "stream": True,
        "length_target": {"tokens": 450, "tolerance": 0.0},
    }
    with engines.two_ranks.stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        for _ in range(5):
            assert "error" not in json.loads(next(filter(None, lines)).removeprefix("data: "))

    def sessions() -> float:
        for client in (engines.two_ranks, engines.little):
            complete(client, length_target=5)  # an engine closes sessions with its next guided step
        return metric(engines.values, "lenvm_sessions")

    wait_until(lambda: sessions() <= 2)  # of these two; vLLM may notice the client late


def test_offline_class(engines: Engines) -> None:
    environment = os.environ | WAITS | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(engines.folder / "model"), engines.url],
        capture_output=True,
        text=True,
        env=environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    guided, plain = json.loads(run.stdout.splitlines()[-1])
    assert guided == 23
    assert plain <= 60
    assert "no values" not in run.stdout + run.stderr

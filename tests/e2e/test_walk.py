"""The walk of docs/training.md with a tiny random Qwen2, from traffic and from prompts: samples,
training on two processes that is killed and given again, figures, a value server, and a request to
a real vLLM that it steers.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from lenvm_vllm.commands.cli import app
from lenvm_vllm.commands.processes import free_port
from tests.e2e.pairs import PATIENT
from tests.support.launched import launch, torchrun
from tests.support.servers import BARE_FLAG, value_serve, vllm_serve
from tests.support.tiny_llm import tiny_qwen
from trainer.training.steps import last_step
from value_server.contract.checkpoint import read_config

pytestmark = pytest.mark.e2e

PROMPTS = 12
# A server takes its model's own sampling where a request does not say.
SAMPLING = {"temperature": 1.0, "top_k": -1, "repetition_penalty": 1.0, "max_tokens": 60}
RECIPE = {
    "--max-length": 320,
    "--tokens-per-step": 1280,
    "--packs-per-pass": 2,
    "--max-steps": 6,
    "--warmup-steps": 0,
    "--learning-rate": 1e-3,
    "--save-steps": 2,
    "--censored": "bound",
    "--holdout": 0.3,
}


@dataclass
class Served:
    """A vLLM with the plugin, whose value server comes later, on `port`."""

    client: httpx.Client
    model: Path
    port: int

    def chat(self, **fields: Any) -> dict[str, Any]:
        reply = self.client.post("/v1/chat/completions", json={"model": "tiny"} | fields)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("walk")
    model, port = tiny_qwen(folder / "model"), free_port()
    env = PATIENT | {"LENVM_URL": f"http://127.0.0.1:{port}"}
    with (
        vllm_serve(model, folder / "vllm.log", *BARE_FLAG, env=env) as url,
        httpx.Client(base_url=url, timeout=120, trust_env=False) as client,
    ):
        yield Served(client, model, port)


def lenvm(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What a command prints as its last line."""
    capsys.readouterr()
    app([str(a) for a in arguments], result_action="return_value")
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


def from_traffic(served: Served, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Conversations of two turns, logged as they were asked and answered."""
    lines = []
    for word in range(PROMPTS):
        messages = [{"role": "user", "content": f"Say {word}."}]
        for _ in range(2):
            request = {"messages": messages} | SAMPLING
            answer = served.chat(**request, return_token_ids=True)
            lines.append(json.dumps({"request": request, "response": answer}) + "\n")
            (choice,) = answer["choices"]
            said = {"role": "assistant", "content": choice["message"]["content"]}
            messages = [*messages, said, {"role": "user", "content": "And?"}]
    (folder / "log.jsonl").write_text("".join(lines))
    told = lenvm(
        capsys, "import-logs", folder / "log.jsonl", folder / "rollouts", "--model", served.model
    )
    assert told["import"]["engine"] == 2 * PROMPTS
    return folder / "rollouts"


def from_prompts(served: Served, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    prompts = "".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in range(PROMPTS))
    (folder / "p.jsonl").write_text(prompts)
    told = lenvm(
        *(capsys, "rollout", folder / "p.jsonl", folder / "rollouts", "--model", "tiny"),
        *("--n", 2, "--max-tokens", 60, "--server", f"{served.client.base_url}/v1"),
    )
    assert told["all"]["completions"] == 2 * PROMPTS
    return folder / "rollouts"


@pytest.mark.parametrize(("source", "tune"), [(from_traffic, "full"), (from_prompts, "lora")])
def test_from_samples_to_a_steered_answer(
    source: Callable[..., Path],
    tune: str,
    served: Served,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rollouts, out = source(served, tmp_path, capsys), tmp_path / "value"
    options = [part for pair in RECIPE.items() for part in pair]
    command = ["train", rollouts, out, "--model", served.model, "--tune", tune, *options]
    command += ["--no-bf16"]
    killed = launch(torchrun("tests.support.killed"), *command, KILL_AT="4")
    assert killed.returncode != 0
    last = last_step(out / "steps")
    assert last is not None, killed.stderr
    assert last.name == "checkpoint-2"
    # Another number of threads adds up otherwise, which stops nothing.
    resumed = launch(torchrun(), *command, OMP_NUM_THREADS="2")
    assert resumed.returncode == 0, resumed.stderr
    assert len(read_config(out).training["loss_curve"]) == 6
    figures = lenvm(capsys, "evaluate", out, rollouts, "--base-model", served.model, "--json")
    assert 0 < figures["completions"] < 2 * PROMPTS

    ask = {"messages": [{"role": "user", "content": "Say 3."}]} | SAMPLING
    ask["length_target"] = {"tokens": 40}
    (choice,) = served.chat(**ask)["choices"]
    assert choice["length_result"]["steered_steps"] == 0  # the rails alone
    with value_serve(out, served.model, tmp_path / "values.log", served.port):
        (choice,) = until_steered(served, ask)["choices"]
    result = choice["length_result"]
    assert 36 <= result["tokens"] <= 44
    assert result["steered_steps"] > 30


def until_steered(served: Served, ask: dict[str, Any]) -> dict[str, Any]:
    """The first answer of a vLLM that has found its value server."""
    limit = time.monotonic() + 180
    while True:
        answer = served.chat(**ask)
        if answer["choices"][0]["length_result"]["steered_steps"] > 30:
            return answer
        assert time.monotonic() < limit
        time.sleep(0.5)

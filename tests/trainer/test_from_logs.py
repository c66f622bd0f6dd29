"""The whole path with a tiny Qwen2: a log, rollouts, training, figures, a value server."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from transformers import AutoTokenizer

from lenvm_vllm.commands.cli import app
from tests.support.tiny import tiny_checkpoint, tiny_tokenizer
from tests.support.tiny_llm import tiny_llm, tiny_qwen
from value_server.contract.checkpoint import read_config, tokenizer_fingerprint
from value_server.contract.wire import MODEL_PATH, PREDICT_PATH
from value_server.serve import build_app
from value_server.settings import ServerSettings

pytestmark = pytest.mark.e2e


def lenvm(*arguments: object) -> None:
    app([str(a) for a in arguments], result_action="return_value")


def line(number: int) -> dict[str, Any]:
    """A conversation of two turns whose answers are as long as its question says; every other one
    with token ids."""
    messages = []
    for length in (number % 5 + 1, number % 7 + 10):
        messages.append({"role": "user", "content": f"{number}: {length} times"})
        messages.append({"role": "assistant", "content": "x" * length})
    tokenizer = tiny_tokenizer()
    ids = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    completion = [*tokenizer(messages[-1]["content"])["input_ids"], 256]
    choice = {"message": messages[-1], "finish_reason": "stop"}
    usage = {"usage": {"completion_tokens": len(completion)}}
    exact = {"prompt_token_ids": ids, "choices": [choice | {"token_ids": completion}]}
    answer = {"choices": [choice]} if number % 2 else exact
    own = {"id": f"chatcmpl-{number}"} | usage | answer
    return {"request": {"messages": messages[:-1]}, "response": own}


def test_from_a_log_to_a_value_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = tiny_qwen(tmp_path / "base"), tmp_path / "value"
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line(n)) + "\n" for n in range(60)))
    lenvm("import-logs", log, tmp_path / "rollouts", "--model", base)
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["import"] == {
        "lines": 60, "turns": 120, "engine": 30, "text": 90, "no_reason": 60,
        "text_exact": 1.0, "engine_exact": 1.0, "counted_alike": 1.0, "our_tokens": 1.0,
    }  # fmt: skip
    assert shown["all"]["completions"] == 120

    # 500 tokens in packs of 200 with passes of 2: it was refused.
    shape = ("--max-length", 200, "--tokens-per-step", 500, "--packs-per-pass", 2)
    short = ("--max-steps", 8, "--learning-rate", 1e-2, "--warmup-steps", 0, "--holdout", 0.3)
    lenvm("train", tmp_path / "rollouts", out, "--model", base, *shape, *short, "--no-bf16")
    assert "tokens_per_step: 400 in place of 500: 1 processes, 1 passes" in capsys.readouterr().out
    config = read_config(out)
    assert config.training["loss_curve"][-1] < config.training["loss_curve"][0]

    lenvm("evaluate", out, tmp_path / "rollouts", "--json")
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < figures["completions"] < 120
    assert figures["completions"] % 2 == 0  # both turns of a conversation are held out

    with TestClient(build_app({"": out}, ServerSettings(device="cpu"))) as client:
        told = client.get(MODEL_PATH).raise_for_status().json()
        served = AutoTokenizer.from_pretrained(base)
        assert told["tokenizer_fingerprint"] == tokenizer_fingerprint(served)
        asked = {"messages": [{"role": "user", "content": "7: 3 times"}]}
        reply = client.post(PREDICT_PATH, json=asked).raise_for_status().json()
        assert reply["predicted_tokens"] > 0

    values = tiny_checkpoint(tmp_path / "other-values", more=("<think>",))
    other = tiny_llm(tmp_path / "other", more=("<think>",))
    for command in (
        ("train", tmp_path / "rollouts", tmp_path / "no", "--model", other),
        ("distil", values, tmp_path / "rollouts", tmp_path / "no"),
        ("evaluate", values, tmp_path / "rollouts"),
    ):
        with pytest.raises(ValueError, match=rf"^rollouts: .*{base}'s tokenizer .* is another"):
            lenvm(*command)
    assert not (tmp_path / "no").exists()

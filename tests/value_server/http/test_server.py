"""The value server as its clients see it: a real process, a real socket, a tiny checkpoint."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError
from transformers import GPTJConfig, GPTJModel

from lenvm_vllm.commands.predict import predict
from lenvm_vllm.commands.servers import LENVM
from tests.support import tiny
from tests.support.value_servers import Server, naive, step, step_body
from value_server.contract import wire
from value_server.contract.checkpoint import tokenizer_fingerprint
from value_server.contract.values import length_from_logit
from value_server.http.text import TextRequest
from value_server.model.value_model import ValueHead, ValueModel
from value_server.serve import serve
from value_server.settings import ServerSettings

pytestmark = pytest.mark.e2e


def error_of(reply: httpx.Response) -> dict[str, Any]:
    error = reply.json()["error"]
    assert set(error) == {"type", "message", "field"}
    assert error["message"]
    found: dict[str, Any] = error
    return found


def test_step_scores_and_closes(client: httpx.Client) -> None:
    first = step(client, ("a", 0, [1, 2, 3], [4, 5]), ("b", 0, [9], [4]))
    expected = [naive([1, 2, 3, 4])[-1], naive([1, 2, 3, 5])[-1], naive([9, 4])[-1]]
    np.testing.assert_allclose(wire.unpack_logits(first.logits), expected, atol=1e-4)
    second = step(client, ("a", 3, [5], [6]))
    expected = [naive([1, 2, 3, 5, 6])[-1]]
    np.testing.assert_allclose(wire.unpack_logits(second.logits), expected, atol=1e-4)
    client.post(wire.STEP_PATH, content=step_body(closed=["a", "never-seen"])).raise_for_status()
    assert step(client, ("a", 4, [6], [7]), ("b", 1, [4], [5])).held == [0, 2]


def test_delete_session(client: httpx.Client) -> None:
    step(client, ("gone", 0, [1], [2]))
    assert client.delete(f"{wire.SESSIONS_PATH}/gone").status_code == 204
    reply = client.delete(f"{wire.SESSIONS_PATH}/gone")
    assert reply.status_code == 404
    assert error_of(reply)["type"] == "unknown_session"


def test_model_info(client: httpx.Client) -> None:
    info = client.get(wire.MODEL_PATH).json()
    assert info["gamma"] == tiny.GAMMA
    assert info["version"] == wire.WIRE_VERSION
    assert (info["vocab_size"], info["max_position"], info["max_candidates"]) == (258, 512, 20)
    assert info["tokenizer_fingerprint"] == tokenizer_fingerprint(tiny.tiny_tokenizer())


def test_predict_and_values(client: httpx.Client) -> None:
    tokenizer = tiny.tiny_tokenizer()
    messages = [{"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    plain = tokenizer("hello")["input_ids"]
    bodies = [
        ({"messages": messages}, ids),
        ({"prompt": "hello"}, plain),
        ({"token_ids": ids}, ids),
    ]
    for body, tokens in bodies:
        lengths = length_from_logit(naive(tokens).double(), tiny.GAMMA)
        one = client.post(wire.PREDICT_PATH, json=body).raise_for_status().json()
        assert one.pop("predicted_tokens") == pytest.approx(lengths[-1].item(), rel=1e-3)
        assert one.keys() == {"predicted_words", "predicted_characters"}
        assert all(amount >= 0 for amount in one.values())
        every = client.post(wire.VALUES_PATH, json=body).raise_for_status().json()
        assert every == {"predicted_tokens": pytest.approx(lengths.tolist(), rel=1e-3)}


def test_the_predict_command(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LENVM_URL", str(client.base_url))
    monkeypatch.setenv("LENVM_TOKEN", Server.tokens[0])
    known = client.post(wire.PREDICT_PATH, json={"prompt": "hello"}).json()
    predict("hello", raw=True)
    units = ("tokens", "words", "characters")
    lines = [f"{known[f'predicted_{unit}']:.1f} {unit}" for unit in units]
    assert capsys.readouterr().out.splitlines() == lines


BAD_STEPS = [
    (b"\xc1 no msgpack", 400, None),
    (step_body(("a", 0, [1], [2]), version=99), 400, "version"),
    (step_body(("a", 0, [1], [2]), ("a", 0, [1], [2])), 400, "sessions"),
    (step_body(("a", 0, [1], [2]), budget_ms=-1), 400, "budget_ms"),
]


@pytest.mark.parametrize(("body", "status", "field"), BAD_STEPS)
def test_bad_steps(client: httpx.Client, body: bytes, status: int, field: str | None) -> None:
    reply = client.post(wire.STEP_PATH, content=body)
    assert reply.status_code == status
    assert error_of(reply)["field"] == field
    assert step(client, ("after", 0, [1], [2])).held == [1]


def test_bad_rows_are_refused_and_the_others_served(client: httpx.Client) -> None:
    bad: list[tuple[str, int, list[int], list[int]]] = [
        ("b0", 0, [258], [2]),
        ("b1", 0, [1], [-1]),
        ("b2", 0, [1], [2] * 21),
        ("b3", 0, [1] * 512, [2]),
        ("b4", 0, [1] * 410, [2]),
    ]
    reply = step(client, ("a", 0, [1], [2]), *bad)
    fields = ("tokens", "candidates", "candidate_counts", "tokens", "tokens")
    for row, field in enumerate(fields, start=1):
        assert reply.refused[row].startswith(f"{field}: ")
        assert len(reply.refused[row]) <= wire.LONGEST_REASON
    assert reply.held == [1, 0, 0, 0, 0, 0]
    z = wire.unpack_logits(reply.logits)
    assert np.isfinite(z[0])
    assert np.isnan(z[1:]).all()


@pytest.mark.parametrize(
    ("content", "status", "field"),
    [
        ("{", 400, "body"),
        ("[]", 422, None),
        ("{}", 422, None),
        ('{"prompt": "a", "token_ids": [1]}', 422, None),
        ('{"prompt": 3}', 422, "prompt"),
        ('{"prompt": ""}', 422, "prompt"),
        ('{"token_ids": []}', 422, "token_ids"),
        ('{"token_ids": [999]}', 422, "token_ids"),
        ('{"token_ids": [99999999999999999999]}', 422, "token_ids"),
        ('{"messages": [{"role": 1}]}', 422, "messages"),
        ('{"promt": "a"}', 422, "promt"),
        ('{"prompt": "\\ud83d"}', 422, "prompt"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', 422, "messages"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud83d"}]}]}',
            422,
            "messages",
        ),
        (json.dumps({"token_ids": [1] * 600}), 422, "token_ids"),
    ],
)
def test_bad_predictions(
    client: httpx.Client, content: str, status: int, field: str | None
) -> None:
    for path in (wire.PREDICT_PATH, wire.VALUES_PATH):
        headers = {"Content-Type": "application/json"}
        reply = client.post(path, content=content, headers=headers)
        assert reply.status_code == status, reply.text
        assert error_of(reply)["field"] == field


@pytest.mark.parametrize("field", ["messages", "token_ids", "pictures"])
def test_a_list_of_wrong_items_is_wrong_once(field: str) -> None:
    """Each error holds its item and more: those of a large body were a hundred times its size."""
    with pytest.raises(ValidationError) as wrong:
        TextRequest.model_validate({"prompt": "a", field: [None] * 1000})
    assert wrong.value.error_count() == 1


def test_oversized_body_declared_or_streamed(client: httpx.Client) -> None:
    def stream() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 1000

    for body in (b"x" * 30_000, stream()):
        try:
            reply = client.post(wire.STEP_PATH, content=body)
        except httpx.WriteError:
            continue  # the server closed the connection before it had all of it
        assert reply.status_code == 413
        assert error_of(reply)["type"] == "body_too_large"
    assert client.get("/health").status_code == 200


def test_token_is_asked_for(client: httpx.Client) -> None:
    for given in ({"Authorization": "Bearer wrong"}, {"Authorization": "Bearer sécret"}, {}):
        headers = {k: v.encode() for k, v in given.items()}
        with httpx.Client(base_url=client.base_url, headers=headers, timeout=60) as other:
            for path in (wire.MODEL_PATH, "/metrics", "/docs"):
                reply = other.get(path)
                assert reply.status_code == 401
                assert error_of(reply)["type"] == "unauthorized"
            assert other.get("/health").status_code == 200
            assert other.get("/ready").status_code == 200


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    for reply, status in ((client.get("/nothing"), 404), (client.get(wire.STEP_PATH), 405)):
        assert reply.status_code == status
        error_of(reply)


def test_metrics(client: httpx.Client) -> None:
    step(client, ("m", 0, [1, 2], [3]))
    step(client, ("m", 2, [3], [4]))
    text = client.get("/metrics").text
    for name in ("step_seconds", "pass_tokens", "sessions", "slots_used", "tokens_saved", "errors"):
        assert f"lenvm_{name}" in text
    assert float(text.split("lenvm_tokens_saved_total ")[-1].split()[0]) >= 1


def broken(folder: Path, how: str) -> Path:
    tiny.tiny_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    if how == "gamma":
        del config["lenvm"]["gamma"]
    elif how == "fingerprint":
        config["lenvm"]["tokenizer_fingerprint"] = "other"
    elif how == "weights":
        (folder / "value_head.safetensors").write_bytes(b"rubbish")
    elif how == "lenvm":
        del config["lenvm"]
    elif how == "GPTJModel":
        shape = GPTJConfig(vocab_size=258, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
        ValueModel(GPTJModel(shape), ValueHead(32), tiny.tiny_model().lenvm).save(folder)
        return folder
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "how", ["gamma", "fingerprint", "weights", "lenvm", "missing", "GPTJModel"]
)
def test_unusable_checkpoint_is_one_line(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("value_server.serve.configure_logs", lambda _: None)
    monkeypatch.setattr("value_server.serve.signal.signal", lambda *_: None)
    folder = tmp_path / "nowhere" if how == "missing" else broken(tmp_path, how)
    with pytest.raises(SystemExit) as ended:
        serve([str(folder)], settings=ServerSettings(port=0))
    error = str(ended.value)
    assert error.startswith(f"error: cannot serve {folder}: ")
    assert "\n" not in error
    if how in ("gamma", "fingerprint", "lenvm", "GPTJModel"):
        assert how in error


def test_a_process_that_cannot_serve_says_why_and_ends(tmp_path: Path) -> None:
    command = [*LENVM, "serve", str(tmp_path / "nowhere"), "--port", "0"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: cannot serve {tmp_path / 'nowhere'}: ")
    assert "Traceback" not in run.stderr

"""Each of the three commands, killed amid its work and given again: nothing is lost or done twice.

The kill is a real SIGKILL of a real process (see tests.support.killed).
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import trainer.evaluation.predict
from lenvm_vllm.commands.cli import app
from tests.support.tiny import tiny_checkpoint
from tests.support.training import contents, toy_rows, write
from trainer.rollout_files import read_rollouts
from trainer.training.steps import last_step

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> None:
    app([str(a) for a in arguments], result_action="return_value")


def killed(at: int, *arguments: object) -> None:
    """Run a command that ends at the `at`-th piece of its work."""
    command = [sys.executable, "-m", "tests.support.killed", *map(str, arguments)]
    env = os.environ | {"KILL_AT": str(at)}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


class Completions(BaseHTTPRequestHandler):
    """Answers a prompt with its bytes; `asked` are all prompts so far."""

    asked: list[str]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][0]["content"]
        self.asked.append(text)
        choices = [{"token_ids": [*text.encode(), 256], "finish_reason": "stop"}] * body["n"]
        ids = [*text.encode()]
        answer = json.dumps({"prompt_token_ids": ids, "choices": choices}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """URL and the prompts asked for."""
    handler = type("Handler", (Completions,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1", handler.asked
        http.shutdown()


def test_rollout(server: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = server
    prompts = [f"p{i}" for i in range(10)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    command = ["rollout", tmp_path / "p.jsonl", tmp_path / "out", "--model", "m", "--server", url]
    command += ["--shard-size", "4", "--concurrency", "1"]
    killed(6, *command)
    assert asked == prompts[:6]
    before = contents(tmp_path / "out")
    assert list(before) == ["part-00000.parquet"]
    run(*command)
    assert asked[6:] == prompts[4:]  # the shard that was begun, and the rest
    assert before.items() < contents(tmp_path / "out").items()
    assert [r.prompt_id for r in read_rollouts(tmp_path / "out")[::2]] == [*map(str, range(10))]


def test_train(base: Path, data: Path, tmp_path: Path) -> None:
    """Three packs a step: amid the fourth of five, after the second was saved."""
    options = [
        *("--model", base, "--tune", "lora", "--holdout", "0", "--max-steps", "5"),
        *("--tokens-per-step", "192", "--max-length", "64", "--save-steps", "2", "--no-bf16"),
        *("--base-model", "org/tiny", "--warmup-steps", "0"),
    ]
    run("train", data, tmp_path / "whole", *options)
    killed(11, "train", data, tmp_path / "out", *options)
    last = last_step(tmp_path / "out" / "steps")
    assert last is not None
    assert last.name == "checkpoint-2"
    run("train", data, tmp_path / "out", *options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed amid the second of two checkpoints, and in the middle of a write besides."""
    checkpoint, other = tiny_checkpoint(tmp_path / "a"), tiny_checkpoint(tmp_path / "b", seed=1)
    data = write(tmp_path / "toy.parquet", toy_rows(12))
    command = ["evaluate", checkpoint, data, "--compare", other, "--json"]
    run(*command)
    whole = capsys.readouterr().out
    before = contents(tmp_path)
    killed(17, *command)
    kept = sorted(tmp_path.glob("*/predictions-*.jsonl"))
    assert [path.parent for path in kept] == [checkpoint, other]
    with kept[0].open("ab") as file:
        file.write(b'{"key": "4", "half')
    predicted: list[Any] = []
    predict = trainer.evaluation.predict.predict

    def counted(*args: Any) -> Any:
        predicted.append(args)
        return predict(*args)

    monkeypatch.setattr(trainer.evaluation.predict, "predict", counted)
    run(*command)
    assert len(predicted) == 24 - 16  # the one in hand was not yet kept
    assert capsys.readouterr().out == whole
    assert contents(tmp_path) == before  # and leaves nothing behind

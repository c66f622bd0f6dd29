"""From a model to figures with a real vLLM: rollouts of its offline class and of its server.

The model is a tiny random Qwen2, whose sampling defaults rollouts must not take.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.e2e.pairs import Pair, tiny_qwen
from value_server.contract.checkpoint import read_config
from value_server.model.value_model import ValueModel

pytestmark = pytest.mark.e2e

ENDS = {256, 257}
N, MAX_TOKENS = 16, 200
SAMPLING = ("--n", N, "--max-tokens", MAX_TOKENS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    tiny_qwen(folder / "base")
    prompts = [json.dumps({"prompt": f"Say {word}."}) + "\n" for word in "abcdefgh"]
    (folder / "p.jsonl").write_text("".join(prompts))
    return folder


def lenvm(*arguments: object) -> str:
    """What a command prints as its last line."""
    run = subprocess.run(
        [sys.executable, "-m", "trainer", *map(str, arguments)],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()[-1]


def check_rollouts(folder: Path) -> None:
    rows: list[dict[str, Any]] = pq.read_table(folder).to_pylist()
    assert len(rows) == 8 * N
    for row in rows:
        ids = row["completion_ids"]
        assert row["finish_reason"] == ("stop" if ids[-1] in ENDS else "length")
        assert ids[-1] in ENDS or len(ids) == MAX_TOKENS
        assert not ENDS & {*ids[:-1]}
    ended = [row["completion_ids"][-1] for row in rows if row["finish_reason"] == "stop"]
    assert {*ended} == ENDS  # by luck one only: 2^-30
    assert len({tuple(row["completion_ids"]) for row in rows}) == len(rows)  # T = 1 of 258 tokens


def test_offline_then_train_and_evaluate(place: Path) -> None:
    base, out = place / "base", place / "value"
    length = ("--max-model-len", 512)
    lenvm("rollout", place / "p.jsonl", place / "r", "--model", base, *length, *SAMPLING)
    check_rollouts(place / "r")
    shape = ("--num-layers", 1, "--tune", "lora", "--lora.rank", 4, "--bf16")
    short = ("--max-steps", 2, "--tokens-per-step", 1024, "--max-length", 512, "--holdout", 0.3)
    lenvm("train", place / "r", out, "--model", base, *shape, *short)
    assert (read_config(out).weights, read_config(out).num_layers) == ("adapter", 1)
    assert ValueModel.load(out).config.model_type == "qwen2"
    figures = json.loads(lenvm("evaluate", out, place / "r", "--json"))
    assert figures["completions"] == figures["prompts"] * N
    assert {*figures["baseline_mre"]} == {""}


@pytest.mark.pair("plain")
def test_rollouts_of_a_server(pair: Pair, place: Path, tmp_path: Path) -> None:
    asked = ("--model", "tiny", *SAMPLING, "--server", f"{pair.url}/v1")
    lenvm("rollout", place / "p.jsonl", tmp_path / "r", *asked)
    check_rollouts(tmp_path / "r")

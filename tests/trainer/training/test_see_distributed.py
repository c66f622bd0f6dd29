"""Two processes that train with pictures give what one gives: data parallel, and sharded."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.launched import launch, sharded, torchrun
from tests.support.tiny_vision import write_backbone
from tests.support.training import run, toy_rows, write
from tests.trainer.training.test_see import pictured_rows
from value_server.contract.checkpoint import read_config

pytestmark = pytest.mark.e2e

SETTINGS = """\
base-model: org/tiny
tune: lora
lora: {rank: 4, alpha: 8}
holdout: 0.0
gamma: 0.8
learning_rate: 3e-3
max-steps: 6
tokens-per-step: 256
max-length: 64
warmup-steps: 0
save-steps: 2
bf16: false
"""
SAME: dict[str, Any] = {"max_steps": 6, "tokens_per_step": 256, "gamma": 0.8, "tune": "lora"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, rollouts, settings, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("seeing")
    base = folder / "base"
    write_backbone(base, "qwen3-vl")
    text = [row | {"prompt_id": f"text-{row['prompt_id']}"} for row in toy_rows(8)]
    data = write(folder / "a.parquet", [*pictured_rows(base, 17), *text])
    (folder / "run.yaml").write_text(SETTINGS + f"model: {base}\n")
    run(data, folder / "one", base, learning_rate=3e-3, **SAME)
    return folder


@pytest.mark.parametrize("kind", ["data parallel", "sharded"])
def test_two_processes_give_the_loss_of_one(kind: str, place: Path) -> None:
    command, out = torchrun() if kind == "data parallel" else sharded(place), place / kind
    files = [place / "a.parquet", out, "--config", place / "run.yaml"]
    result = launch(command, "train", *files)
    assert result.returncode == 0, result.stderr
    curves = [read_config(folder).training["loss_curve"] for folder in (place / "one", out)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert curves[0][-1] < curves[0][0] / 2

"""The recipes of trainer/configs, end to end on tiny models of their classes, with sizes that a
test waits for: trained as their heads say, killed, resumed, evaluated."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from lenvm_vllm.commands.cli import app
from tests.support.launched import CONFIGS, launch, sharded, torchrun
from tests.support.tiny_llm import tiny_qwen, tiny_qwen3
from tests.support.training import LENGTHS, toy_rows, write
from trainer.training.steps import last_step
from value_server.contract.checkpoint import read_config
from value_server.model.value_model import ValueModel

pytestmark = pytest.mark.e2e

THINK_END = 259  # of tiny_qwen3
SIZES = {
    "--base-model": "org/tiny",
    "--max-length": 64,
    "--tokens-per-step": 256,
    "--packs-per-pass": 2,
    "--max-steps": 6,
    "--warmup-steps": 0,
    "--learning-rate": 1e-3,
    "--holdout": 0.3,
    "--eval-steps": 2,
}


def one(_folder: Path) -> list[str]:
    return [sys.executable, "-m", "tests.support.killed"]


def two(_folder: Path) -> list[str]:
    return torchrun("tests.support.killed")


@pytest.mark.parametrize(
    ("name", "tiny", "command"),
    [
        ("7b-on-24gb", tiny_qwen, one),
        ("30b-on-8-gpus", tiny_qwen, sharded),
        ("paper", tiny_qwen, two),
        ("thinking", tiny_qwen3, one),
    ],
)
def test_a_recipe_runs(
    name: str,
    tiny: Callable[[Path], Path],
    command: Callable[[Path], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed amid the fourth step of four packs, it goes on after the second."""
    base, out = tiny(tmp_path / "base"), tmp_path / "out"
    rows = toy_rows(distinct=True)
    if name == "thinking":  # whose length is all that the toy task tells
        for row in rows:
            row["completion_ids"][-1:] = [THINK_END, *b"answer", 256]
    data = write(tmp_path / "toy.parquet", rows)
    sizes = [str(part) for pair in SIZES.items() for part in pair] + ["--no-bf16"]
    recipe = ("--config", CONFIGS / f"{name}.yaml", "--model", base)
    start = command(tmp_path)
    passes = 7 if command is one else 4  # of one process
    killed = launch(start, "train", data, out, *recipe, *sizes, KILL_AT=str(passes), KILL_AFTER="3")
    assert killed.returncode != 0
    last = last_step(out / "steps")
    assert last is not None, killed.stderr
    assert last.name == "checkpoint-2"
    result = launch(start, "train", data, out, *recipe, *sizes, KILL_AT="-1")
    assert result.returncode == 0, result.stderr
    config = read_config(out)
    assert config.training["loss_curve"][-1] < config.training["loss_curve"][0] / 2
    assert config.training["best_step"] in (2, 4, 6)
    assert ValueModel.load(out).config.model_type == AutoConfig.from_pretrained(base).model_type
    assert 1 - config.gamma ** max(LENGTHS) == pytest.approx(0.99, abs=0.001)
    capsys.readouterr()
    app(["evaluate", str(out), str(data), "--json"], result_action="return_value")
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < figures["completions"] < len(rows)


def test_every_recipe_is_run() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {"fsdp2", "7b-on-24gb", "30b-on-8-gpus", "paper", "thinking"}

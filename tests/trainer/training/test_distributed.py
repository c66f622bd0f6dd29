"""Two processes give what one gives: data parallel, and sharded with the repository's config."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launched import launch, sharded, torchrun
from tests.support.tiny_llm import tiny_llm
from tests.support.training import run, toy_rows, training, write
from trainer.data import PackedDataset
from trainer.training.examples import read_examples
from trainer.training.steps import last_step
from value_server.contract.checkpoint import read_config

pytestmark = pytest.mark.e2e

SETTINGS = """\
base-model: org/tiny
tune: full
holdout: 0.3
eval-steps: 2
learning_rate: 1e-3
max-steps: 6
tokens-per-step: 256
max-length: 64
warmup-steps: 0
save-steps: 2
bf16: false
"""
SAME: dict[str, Any] = {"max_steps": 6, "tokens_per_step": 256, "holdout": 0.3, "eval_steps": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, rollouts, settings, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("distributed")
    base = tiny_llm(folder / "base")
    data = write(folder / "toy.parquet", toy_rows(43, distinct=True))  # 12 packs, 5 held out
    (folder / "run.yaml").write_text(SETTINGS + f"model: {base}\n")
    run(data, folder / "one", base, tune="full", **SAME)
    return folder


def train(
    command: list[str],
    place: Path,
    output: str,
    *options: str,
    data: str = "toy.parquet",
    **env: str,
) -> subprocess.CompletedProcess:
    """On `place`, in two processes."""
    files = [place / data, place / output, "--config", place / "run.yaml"]
    return launch(command, "train", *files, *options, **env)


def assert_same(one: Path, two: Path) -> None:
    curves = [read_config(folder).training["loss_curve"] for folder in (one, two)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < curves[0][0] / 2
    looks = [read_config(folder).training["held_out_loss"] for folder in (one, two)]
    assert looks[0] == pytest.approx(looks[1], rel=1e-4)
    for file in sorted(path.name for path in one.glob("*.safetensors")):
        weights = [load_file(folder / file) for folder in (one, two)]
        assert weights[0].keys() == weights[1].keys()
        for name, tensor in weights[0].items():
            torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_two_processes_give_the_loss_of_one(place: Path) -> None:
    """Each takes half of the packs of a step; the bug guarded against is a mean of two means.
    Asked for 300 tokens a step they take what comes nearest, and one of them says so."""
    result = train(torchrun(), place, "two", "--tokens-per-step", "300")
    assert result.returncode == 0, result.stderr
    told = "tokens_per_step: 256 in place of 300: 2 processes, 2 passes of 1 packs of 64\n"
    assert result.stdout.count(told) == 1
    assert_same(place / "one", place / "two")


def test_packs_that_cannot_be_shared_count_once(place: Path) -> None:
    """13 packs an epoch, and none of them for the other process at its end. The bug guarded
    against: it took the first one of the epoch again."""
    name = "uneven.parquet"
    data = write(place / name, toy_rows(46, distinct=True))
    examples, _ = read_examples(data, training(place / "base", holdout=0.3))
    packs = PackedDataset(examples.learnt, 64, seed=0)
    assert len(packs) % 4 == 1
    more: dict[str, Any] = {"max_steps": -1, "epochs": 2.0, "lookahead": 4}
    run(data, place / "one-uneven", place / "base", tune="full", **SAME | more)
    options = ("--max-steps", "-1", "--epochs", "2", "--lookahead", "4")
    result = train(torchrun(), place, "two-uneven", *options, data=name)
    assert result.returncode == 0, result.stderr
    assert_same(place / "one-uneven", place / "two-uneven")


def test_sharded_and_killed_it_gives_the_same(place: Path) -> None:
    command = sharded(place)
    killed = train(command, place, "sharded", KILL_AFTER="3")
    assert killed.returncode != 0
    assert "sharded: ['', 'backbone.layers.0', 'backbone.layers.1']\n" in killed.stdout, (
        killed.stderr
    )
    last = last_step(place / "sharded" / "steps")
    assert last is not None
    assert last.name == "checkpoint-2"
    result = train(command, place, "sharded")
    assert result.returncode == 0, result.stderr
    assert_same(place / "one", place / "sharded")
    assert not (place / "sharded" / "steps").exists()


def test_sharded_in_bfloat16_with_frozen_weights(place: Path) -> None:
    """Frozen bfloat16 weights and trained float32 ones in one unit."""
    shape = ("--lora.rank", "4", "--lora.alpha", "8")
    run(place / "toy.parquet", place / "one-lora", place / "base", tune="lora", bf16=True, **SAME)
    result = train(sharded(place), place, "sharded-lora", "--tune", "lora", "--bf16", *shape)
    assert result.returncode == 0, result.stderr
    folders = (place / "one-lora", place / "sharded-lora")
    curves = [read_config(folder).training["loss_curve"] for folder in folders]
    assert curves[0] == pytest.approx(curves[1], rel=0.02)
    assert curves[0][-1] < curves[0][0]

"""What is learnt from rollouts, and what the checkpoint will say of it."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_llm import tiny_qwen3
from tests.support.training import LENGTHS, row, toy_rows, training, write
from trainer.data import Example
from trainer.evaluation.predictors import split_as_trained
from trainer.rollout_files import read_rollouts
from trainer.training.examples import read_examples
from value_server.contract.checkpoint import LenvmConfig


def read(data: Path, base: Path, **options: Any) -> tuple[list[Example], LenvmConfig]:
    examples, config = read_examples(data, training(base, **options))
    return examples.learnt, config


def test_gamma_comes_from_a_percentile_of_finished_lengths(base: Path, tmp_path: Path) -> None:
    """A hundred of length 3 to 102, of which 101.01 is the 99th; cut ones do not count."""
    rows = [row(i, [1], [2] * (i + 3)) for i in range(100)]
    cut = [row(i, [1], [2] * 300, "length") for i in range(50)]
    path = write(tmp_path / "a.parquet", rows + cut)
    for length, options in ((101.01, {}), (52.5, {"gamma_percentile": 50.0})):
        _, config = read(path, base, **options)
        assert 1 - config.gamma**length == pytest.approx(0.99)
    _, config = read(path, base, gamma=0.9)
    assert config.gamma == 0.9


def test_cut_completions_are_bounds_or_nothing(base: Path, tmp_path: Path) -> None:
    rows = [*toy_rows(6), *(row(i, [1], [2] * 9, "length") for i in range(4))]
    path = write(tmp_path / "a.parquet", rows)
    examples, config = read(path, base, censored="drop")
    assert [e.is_cut for e in examples] == [False] * 6
    assert (config.training["completions"], config.training["cut"]) == (6, 0)
    for censored, size in (("bound", 10), ("prompt", 1)):  # of a prompt of one token
        examples, config = read(path, base, censored=censored)
        assert [e.is_cut for e in examples] == [False] * 6 + [True] * 4
        assert {len(e.input_ids) for e in examples[6:]} == {size}
        assert [e.labels[0] for e in examples[6:]] == [10.0] * 4
        assert (config.training["completions"], config.training["cut"]) == (10, 4)


def test_the_scale_of_a_normalised_length_is_the_longest_label(base: Path, data: Path) -> None:
    _, config = read(data, base, target="normalised_length")
    assert config.target_scale == max(LENGTHS)


def test_prompts_held_out_are_not_trained_on(base: Path, data: Path) -> None:
    examples, config = read(data, base, holdout=0.5)
    assert 10 < len(examples) == config.training["completions"] < 38
    assert config.training["holdout"] == 0.5


def test_texts_of_thinkings_end_at_their_marker(tmp_path: Path) -> None:
    """In training and when it is judged: what follows the marker is not learnt."""
    base = tiny_qwen3(tmp_path / "base")
    rows = toy_rows(6, distinct=True)
    for found in rows[:4]:
        found["completion_ids"][-1:] = [259, *b"answer", 256]
    path = write(tmp_path / "a.parquet", rows)
    examples, config = read(path, base, thinking_end="</think>")
    assert [e.labels.max() for e in examples] == [4, 12, 40, 4]
    assert [e.input_ids[-1] for e in examples] == [259] * 4
    facts = config.training
    assert (facts["thinking_end"], facts["thinking_end_id"], facts["completions"]) == (
        *("</think>", 259),
        4,
    )
    judged = split_as_trained(read_rollouts(path), config, 1.0)[1]
    assert [len(r.completion_ids) for r in judged] == [4, 12, 40, 4]
    assert "thinking_end" not in read(path, base)[1].training

"""What training refuses, by name and before any work."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from tests.support.tiny import tiny_tokenizer
from tests.support.training import contents, run, toy_rows, write
from trainer.reading import Reading
from trainer.training.backbone import LoraShape


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tune", "half"),
        ("censored", "keep"),
        ("target", "words"),
        ("loss", "absolute"),
        ("weighting", "prompt"),
        ("batches", "sorted"),
        ("gae_lambda", 1.1),
        ("gamma_percentile", 0.0),
        ("holdout", 1.0),
        ("holdout", -0.1),
        ("gamma", 0.0),
        ("gamma", 1.0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("epochs", 0.0),
        ("max_steps", 0),
        ("max_steps", -2),
        ("max_length", 1),
        ("tokens_per_step", 0),
        ("warmup_steps", -1),
        ("save_steps", 0),
        ("scheduler", "step"),
        ("weight_decay", -0.1),
        ("weight_decay", 1.0),
        ("num_layers", 0),
        ("num_layers", 3),
        ("fp16", True),
    ],
)
def test_a_bad_argument_is_named_before_any_work(
    name: str, value: Any, base: Path, tmp_path: Path
) -> None:
    """Before any work: the rollouts are not even looked for."""
    with pytest.raises(ValueError, match=f"^{name}: {value!r}, must be "):
        run(tmp_path / "nothing", tmp_path / "out", base, **{name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "shape"), [("rank", LoraShape(rank=0)), ("alpha", LoraShape(alpha=-1))]
)
def test_a_bad_adapter_is_named(name: str, shape: LoraShape, base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"^lora\.{name}: {getattr(shape, name)}, must be above 0"
    ):
        run(tmp_path / "nothing", tmp_path / "out", base, lora=shape)


def test_no_such_model(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model: .*nothing' does not load"):
        run(data, tmp_path / "out", tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


def test_positions_that_are_looked_up_are_not_passed(base: Path, tmp_path: Path) -> None:
    """In training, and by what reads a checkpoint afterwards; rope has positions for all."""
    data = write(tmp_path / "a.parquet", toy_rows(3))
    shape = GPT2Config(vocab_size=258, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    GPT2Model(shape).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    names = {"base_model": str(tmp_path / "gpt2"), "max_steps": 1}
    with pytest.raises(ValueError, match=r"^max_length: 64, must be at most 32, the positions of "):
        run(data, tmp_path / "out", tmp_path / "gpt2", **names)
    run(data, tmp_path / "out", tmp_path / "gpt2", max_length=32, **names)
    with pytest.raises(ValueError, match=r"^max_length: 33, must be at most 32, the positions of "):
        Reading(max_length=33).load(tmp_path / "out")
    Reading(max_length=32).load(tmp_path / "out")
    run(data, tmp_path / "rope", base, max_length=1000, max_steps=1)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_an_encoder_is_no_backbone(tune: Any, data: Path, tmp_path: Path) -> None:
    """It would learn from the tokens that are still to come, and forecast nothing."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(vocab_size=258, num_hidden_layers=1, initializer_range=0.3, **shape)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"^model: '.*bert', must be a decoder, whose tokens do"):
        run(data, tmp_path / "out", tmp_path / "bert", tune=tune)


def test_the_backbone_is_not_written_over(base: Path, data: Path) -> None:
    before = contents(base)
    with pytest.raises(ValueError, match=r"^output: .* must be another folder"):
        run(data, base / ".." / base.name, base)
    assert contents(base) == before


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda r: r | {"finish_reason": "length"}, {}, "^gamma: .* no finished completion"),
        (lambda r: r | {"finish_reason": "length"}, {"gamma": 0.9}, "^rollouts: .* nothing to tr"),
        (lambda r: r | {"prompt_ids": [1] * 65}, {}, "^rollouts: .* max_length 64"),
        (
            lambda r: r | {"prompt_ids": [258]},
            {},
            "^token id: 258, must be below .* vocab_size 258",
        ),
    ],
)
def test_rollouts_that_teach_nothing(
    change: Callable[[Any], Any],
    options: dict[str, Any],
    message: str,
    base: Path,
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.parquet", [change(r) for r in toy_rows(3)])
    with pytest.raises(ValueError, match=message):
        run(path, tmp_path / "out", base, **options)
    assert not (tmp_path / "out").exists()


def test_a_marker_of_a_thinking_is_one_token(base: Path, tmp_path: Path) -> None:
    """The tiny tokenizer spells it."""
    with pytest.raises(
        ValueError, match=r"^thinking_end: '</think>', must be one token of .*, it has 8"
    ):
        run(tmp_path / "nothing", tmp_path / "out", base, thinking_end="</think>")

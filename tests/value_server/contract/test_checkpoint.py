"""The `lenvm` block of config.json, and the tokenizer's fingerprint."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.tiny import tiny_tokenizer
from value_server.contract.checkpoint import (
    CheckpointError,
    LenvmConfig,
    read_config,
    tokenizer_fingerprint,
)

CONFIG = LenvmConfig(
    gamma=0.9970123456789,
    base_model="org/name",
    weights="adapter",
    num_layers=8,
    tokenizer_fingerprint="f" * 64,
    training={"seed": 0},
)


def write(folder: Path, block: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "lenvm": block}))
    return folder


def test_round_trip(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, msgspec.to_builtins(CONFIG))) == CONFIG


@pytest.mark.parametrize("field", ["gamma", "base_model", "weights", "tokenizer_fingerprint"])
def test_missing_field_is_named(field: str, tmp_path: Path) -> None:
    """Above all gamma: there is no default, a guess would steer to a wrong length."""
    block = msgspec.to_builtins(CONFIG)
    del block[field]
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{field}"):
        read_config(write(tmp_path, block))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.0}, r"gamma .* got 0\.0"),
        ({"gamma": 1}, r"gamma .* got 1\.0"),
        ({"gamma": "0.9"}, r"\$\.gamma"),
        ({"weights": "half"}, "weights: unknown value 'half'"),
        ({"target": "words"}, r"'words'.*\$\.target"),
        ({"target_scale": 0.0}, "target_scale: 0.0, must be above 0"),
        ({"num_layers": "all"}, r"\$\.num_layers"),
        ({"gama": 0.9}, "gama"),
    ],
)
def test_wrong_field_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config(write(tmp_path, msgspec.to_builtins(CONFIG) | change))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "llama"}', "no 'lenvm' block"),
        ("{", r"config\.json: "),
        ("[]", "no 'lenvm' block"),
        ('{"lenvm": null}', r"config\.json: "),
    ],
)
def test_not_our_checkpoint(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_fingerprint_survives_saving(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


def test_fingerprint_sees_an_added_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(tiny_tokenizer())


class Vocabulary:
    """A tokenizer as far as the fingerprint is concerned."""

    def __init__(self, *tokens: str) -> None:
        self._vocab = {token: index for index, token in enumerate(tokens)}

    def get_vocab(self) -> dict[str, int]:
        return dict(reversed(self._vocab.items()))  # any order


def test_fingerprint_sees_which_id_a_token_has() -> None:
    known = tokenizer_fingerprint(Vocabulary("a", "b"))
    assert known == tokenizer_fingerprint(Vocabulary("a", "b"))
    assert known != tokenizer_fingerprint(Vocabulary("b", "a"))
    assert known != tokenizer_fingerprint(Vocabulary("ab"))

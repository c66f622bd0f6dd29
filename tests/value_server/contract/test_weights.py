"""Fingerprints of weights: what makes another one, and what does not."""

import json
import logging
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.support.tiny_llm import tiny_llm
from value_server.contract.checkpoint import read_config
from value_server.contract.weights import are_other_weights, weights_fingerprint
from value_server.model.value_model import ValueModel

ROOT = Path(__file__).parents[3]
SMALL = ROOT / ".venv" / "share" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm(tmp_path_factory.mktemp("weights") / "model")


def written(folder: Path, *parts: dict[str, Tensor]) -> str:
    folder.mkdir()
    for number, part in enumerate(parts):
        save_file(part, folder / f"model-{number}.safetensors")
    return weights_fingerprint(str(folder))


def weights_of(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


def test_storage_names_and_shards_do_not_matter(model: Path, tmp_path: Path) -> None:
    ours, weights = weights_fingerprint(str(model)), weights_of(model)
    assert ours.startswith("258x128-")
    assert written(tmp_path / "float32", {n: w.float() for n, w in weights.items()}) == ours
    bare = {name.removeprefix("model."): weight for name, weight in weights.items()}
    names = sorted(bare)
    halves = ({n: bare[n] for n in names[::2]}, {n: bare[n] for n in names[1::2]})
    assert written(tmp_path / "shards", *halves) == ours


def test_rounding_is_that_of_torch(model: Path, tmp_path: Path) -> None:
    """A model that is stored in float32 has the fingerprint of its bfloat16 copy."""
    torch.manual_seed(0)
    fine = {n: torch.randn_like(w, dtype=torch.float32) for n, w in weights_of(model).items()}
    coarse = {name: weight.bfloat16() for name, weight in fine.items()}
    assert written(tmp_path / "fine", fine) == written(tmp_path / "coarse", coarse)


@pytest.mark.parametrize("part", ["embed_tokens.weight", "layers.0.mlp.down_proj.weight"])
def test_a_small_change_of_embedding_or_lowest_layer(
    part: str, model: Path, tmp_path: Path
) -> None:
    weights = weights_of(model)
    weights[f"model.{part}"][0, 3] *= 1.02
    ours, theirs = weights_fingerprint(str(model)), written(tmp_path / "changed", weights)
    assert are_other_weights(ours, theirs)
    assert not are_other_weights(ours, ours)


def test_models_of_other_shapes_are_not_compared() -> None:
    """A small value model for a large served one: both are what they should be."""
    assert not are_other_weights("258x128-aa", "258x64-bb")
    assert not are_other_weights("", "258x64-bb")
    assert not are_other_weights("258x64-bb", "")


def test_what_has_none(tmp_path: Path, model: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert weights_fingerprint(str(tmp_path)) == ""
    assert weights_fingerprint(str(tmp_path / "nowhere")) == ""
    assert weights_fingerprint("nobody/nothing") == ""
    other = {n: w for n, w in weights_of(model).items() if "embed_tokens" not in n}
    assert written(tmp_path / "no-embedding", other) == ""


def test_a_head_on_other_weights_is_told_when_it_loads(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = tmp_path / "checkpoint"
    tiny = tiny_model()
    tiny.backbone.config.hidden_size = 128
    head = type(tiny.head)(128)
    facts = {"weights": "head", "base_fingerprint": weights_fingerprint(str(model))}
    lenvm = msgspec.structs.replace(tiny.lenvm, **facts)
    ValueModel(tiny.backbone, head, lenvm).save(checkpoint)
    tiny_tokenizer().save_pretrained(checkpoint)
    with caplog.at_level(logging.WARNING):
        ValueModel.load(checkpoint, str(model))
        assert "other weights" not in caplog.text
        others = [tiny_llm(tmp_path / "other", seed=1), tiny_llm(tmp_path / "larger", more=("x",))]
        for other in others:
            ValueModel.load(checkpoint, str(other))
            told = f"{checkpoint}: was trained on other weights than those of {other}"
            assert told in caplog.text


def test_the_shipped_checkpoint_names_the_weights_that_the_set_up_makes() -> None:
    shipped = read_config(ROOT / "checkpoints" / "smollm2-135m-instruct")
    assert shipped.base_fingerprint
    if SMALL.exists():
        assert weights_fingerprint(str(SMALL)) == shipped.base_fingerprint
    config = json.loads((ROOT / "checkpoints/smollm2-135m-instruct/config.json").read_text())
    assert shipped.base_fingerprint.startswith(f"{config['vocab_size']}x{config['hidden_size']}-")

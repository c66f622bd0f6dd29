"""Vision-language backbones: their text part computes what the whole computes on text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_vision import BACKBONES, VOCABULARY, write_backbone
from tests.support.training import row, run, write
from trainer.training.backbone import load_shape
from value_server.contract.checkpoint import CheckpointError
from value_server.model.backbone import load_backbone
from value_server.model.value_model import ValueModel

IDS = torch.arange(24).reshape(2, 12) * 7 % 250


@torch.inference_mode()
def hidden(backbone: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    output: torch.Tensor = backbone(ids, use_cache=False, **options).last_hidden_state
    return output


@pytest.mark.parametrize("name", BACKBONES)
def test_it_computes_what_the_whole_computes(name: str, tmp_path: Path) -> None:
    decoder = write_backbone(tmp_path, name).get_decoder()
    backbone = load_backbone(str(tmp_path))
    assert type(backbone).__name__ == BACKBONES[name][4]
    torch.testing.assert_close(hidden(backbone), hidden(decoder), rtol=1e-4, atol=1e-4)
    assert load_shape(str(tmp_path)) == (3, VOCABULARY)


@pytest.mark.parametrize("name", BACKBONES)
def test_packed_texts_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    """The bug guarded against: Qwen's own class masks by length where positions tell texts."""
    write_backbone(tmp_path, name)
    backbone = load_backbone(str(tmp_path), 2)
    assert backbone.config.num_hidden_layers == 2
    texts = [IDS[:1, :n] for n in (5, 1, 12, 3)]
    positions = torch.cat([torch.arange(t.shape[1]) for t in texts])[None]
    packed = hidden(backbone, torch.cat(texts, dim=1), position_ids=positions)
    alone = torch.cat([hidden(backbone, t) for t in texts], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_value_model_on_it_is_trained_and_read_back(tune: Any, tmp_path: Path) -> None:
    write_backbone(tmp_path / "base", "qwen2.5-vl")
    data = write(tmp_path / "a.parquet", [row(i, [1, 2], [*range(i + 2), 256]) for i in range(9)])
    run(data, tmp_path / "out", tmp_path / "base", tune=tune, num_layers=2, max_steps=2)
    model = ValueModel.load(tmp_path / "out", str(tmp_path / "base"))
    assert type(model.backbone).__name__ == "Qwen2Model"
    assert model.config.num_hidden_layers == 2


def test_a_depth_that_it_does_not_have(tmp_path: Path) -> None:
    write_backbone(tmp_path, "qwen2.5-vl")
    with pytest.raises(CheckpointError, match="num_layers: 4 of 3"):
        load_backbone(str(tmp_path), 4)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    write_backbone(tmp_path, "qwen2.5-vl")
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    lost = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file({n: t for n, t in weights.items() if n != lost}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: .*layers\.1\.mlp\.up_proj\.weight"):
        load_backbone(str(tmp_path))

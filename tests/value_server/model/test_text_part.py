"""Vision-language backbones: their text part computes what the whole computes on text."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests.support.tiny import tiny_tokenizer
from tests.support.training import row, run, write
from trainer.training.backbone import load_shape
from value_server.contract.checkpoint import CheckpointError
from value_server.model.value_model import ValueModel, load_backbone

IDS = torch.arange(24).reshape(2, 12) * 7 % 250
TEXT: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
QWEN |= {"out_hidden_size": 32}
SIGLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIGLIP |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
BACKBONES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "qwen2.5-vl": ("Qwen2_5_VL", {"rope_parameters": MROPE}, QWEN, "Qwen2Model"),
    "qwen3-vl": (
        "Qwen3VL",
        {"rope_parameters": MROPE},
        QWEN | {"deepstack_visual_indexes": [0]},
        "Qwen3Model",
    ),
    "gemma3": ("Gemma3", {"sliding_window": 4}, SIGLIP, "Gemma3TextModel"),
    "llava": (
        "Llava",
        {"model_type": "llama"},
        SIGLIP | {"model_type": "siglip_vision_model"},
        "LlamaModel",
    ),
}


def write_backbone(folder: Path, name: str) -> Any:
    """A random vision-language model on disk, and its decoder."""
    torch.manual_seed(0)
    kind, text, vision, _ = BACKBONES[name]
    config = getattr(tf, f"{kind}Config")(text_config=TEXT | text, vision_config=vision)
    model = tf.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.model.get_decoder()


@torch.inference_mode()
def hidden(backbone: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    output: torch.Tensor = backbone(ids, use_cache=False, **options).last_hidden_state
    return output


@pytest.mark.parametrize("name", BACKBONES)
def test_it_computes_what_the_whole_computes(name: str, tmp_path: Path) -> None:
    decoder = write_backbone(tmp_path, name)
    backbone = load_backbone(str(tmp_path))
    assert type(backbone).__name__ == BACKBONES[name][-1]
    torch.testing.assert_close(hidden(backbone), hidden(decoder), rtol=1e-4, atol=1e-4)
    assert load_shape(str(tmp_path)) == (3, 258)


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

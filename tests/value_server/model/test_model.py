"""Value models on disk and off: the same outputs, nothing but safetensors, clear refusals.

Odds of passing by luck: the outputs of a tiny model spread by 0.03 and more, the tolerance is 1e-4.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.support.tiny import GAMMA
from trainer.training.backbone import WEIGHTS, Backbone, LoraShape, Tune
from value_server.contract.checkpoint import CheckpointError, LenvmConfig
from value_server.model.backbone import load_backbone, log
from value_server.model.value_model import ValueHead, ValueModel

CONFIGS = [LlamaConfig, Qwen2Config, Qwen3Config]
TUNES: list[Tune] = ["full", "lora", "head"]
IDS = torch.arange(24).reshape(2, 12) * 5 % 64
BASE_NAME = "org/base"


def write_base(folder: Path, kind: type[PretrainedConfig] = LlamaConfig, layers: int = 3) -> Path:
    """A random backbone of `kind`, as a hub checkpoint has it: with tied embeddings."""
    torch.manual_seed(0)
    config = kind(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def build(base: Path, tune: Tune, layers: int = 3, rank: int = 0) -> ValueModel:
    """A value model whose every trained weight is random."""
    config = LenvmConfig(
        gamma=GAMMA,
        base_model=BASE_NAME,
        weights=WEIGHTS[tune],
        num_layers=layers,
        tokenizer_fingerprint="f",
        lookahead_rank=rank,
    )
    backbone = Backbone(model=str(base), tune=tune, lora=LoraShape(rank=4, alpha=8))
    model = backbone.build(config, torch.float32)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.inference_mode()
def outputs(model: ValueModel, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    return model(ids, **options)


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip(kind: type[PretrainedConfig], tune: Tune, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", kind)
    model = build(base, tune, layers=2)
    model.save(tmp_path / "out")
    loaded = ValueModel.load(tmp_path / "out", str(base))
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-4, atol=1e-5)
    assert loaded.lenvm == model.lenvm
    assert outputs(model).std() > 0.03


@pytest.mark.parametrize("tune", TUNES)
def test_round_trip_of_a_lookahead_head(tune: Tune, tmp_path: Path) -> None:
    """A checkpoint without one, written over it, has no file of it."""
    base, out = write_base(tmp_path / "base"), tmp_path / "out"
    model = build(base, tune, rank=4)
    model.save(out)
    loaded = ValueModel.load(out, str(base))
    assert loaded.lenvm.lookahead_rank == 4
    nexts = torch.arange(48).reshape(2, 12, 2)
    with torch.inference_mode():
        found, expected = (own.following(own.hidden(IDS), nexts) for own in (loaded, model))
    assert found.shape == (2, 12, 2)
    assert found.std() > 0.03
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    build(base, tune).save(out)
    assert not (out / "lookahead.safetensors").exists()
    assert ValueModel.load(out, str(base)).lookahead is None


def test_values_after_next_tokens_are_b_and_q_times_k(tmp_path: Path) -> None:
    """At chosen places of a batch, one next token at a time; a token that comes twice as well."""
    model = build(write_base(tmp_path / "base"), "head", rank=4)
    places, nexts = torch.tensor([3, 13, 14]), torch.tensor([[5, 9], [9, 9], [63, 0]])
    with torch.inference_mode():
        z, (found,) = model(IDS, after=[(places, nexts)])
        hidden = model.hidden(IDS)
        embeddings = model.backbone.get_input_embeddings().weight
        for row, place in enumerate(places.tolist()):
            b, *q = model.lookahead(hidden[place // 12, place % 12]).tolist()
            for column in range(2):
                k = model.lookahead.keys(embeddings[nexts[row, column]]).tolist()
                expected = b + sum(x * y for x, y in zip(q, k, strict=True))
                assert found[row, column].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(z, outputs(model))


def test_no_place_at_all_has_gradients_of_zero(tmp_path: Path) -> None:
    """As of a pack of prompts alone: with several processes every weight needs a gradient."""
    model = build(write_base(tmp_path / "base"), "head", rank=4)
    none = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64))
    z, (found,) = model(IDS, after=[none])
    assert found.shape == (0, 1)
    (z.sum() + found.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.lookahead.parameters())


def test_without_a_lookahead_head_nothing_is_told(tmp_path: Path) -> None:
    model = build(write_base(tmp_path / "base"), "head")
    with pytest.raises(RuntimeError, match=r"^lookahead_rank: 0"):
        model.following(model.hidden(IDS), IDS[..., None])


def test_a_missing_lookahead_file_is_named(tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "out"
    build(base, "head", rank=4).save(out)
    (out / "lookahead.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lookahead\.safetensors"):
        ValueModel.load(out, str(base))


@pytest.mark.parametrize("tune", TUNES)
def test_only_safetensors_and_no_path_of_this_machine(tune: Tune, tmp_path: Path) -> None:
    build(write_base(tmp_path / "base"), tune).save(tmp_path / "out")
    files = list((tmp_path / "out").iterdir())
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    if tune == "lora":
        adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == BASE_NAME
    saved = [path.name for path in files if path.suffix == ".safetensors"]
    backbone = {"full": ["model.safetensors"], "lora": ["adapter_model.safetensors"], "head": []}
    assert sorted(saved) == [*backbone[tune], "value_head.safetensors"]


def test_bfloat16_backbone_keeps_a_float32_head(tmp_path: Path) -> None:
    build(write_base(tmp_path / "base"), "lora").save(tmp_path / "out")
    model = ValueModel.load(tmp_path / "out", str(tmp_path / "base"), torch.bfloat16)
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    assert outputs(model).dtype == torch.float32


def test_head_is_summary_of_silu_of_fc() -> None:
    head = ValueHead(4)
    h = torch.randn(3, 4)
    hidden = h @ head.fc.weight.T + head.fc.bias
    expected = (hidden * torch.sigmoid(hidden)) @ head.summary.weight[0] + head.summary.bias
    torch.testing.assert_close(head(h), expected)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_first_layers_of_a_backbone(
    kind: type[PretrainedConfig], layers: int, tmp_path: Path
) -> None:
    whole: PreTrainedModel = load_backbone(str(write_base(tmp_path, kind)))
    part = load_backbone(str(tmp_path), layers)
    seen: list[torch.Tensor] = []
    whole.layers[layers - 1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.inference_mode():
        whole(IDS)
        expected = whole.norm(seen[0])
        torch.testing.assert_close(part(IDS).last_hidden_state, expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_texts_do_not_see_each_other(kind: type[PretrainedConfig], tmp_path: Path) -> None:
    model = build(write_base(tmp_path, kind), "full")
    texts = [IDS[0, :n] for n in (5, 1, 12, 3)]
    positions = torch.cat([torch.arange(len(t)) for t in texts])[None]
    packed = outputs(model, torch.cat(texts)[None], position_ids=positions)
    alone = torch.cat([outputs(model, t[None]) for t in texts], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_output_at_a_token_does_not_know_what_follows(tmp_path: Path) -> None:
    model = build(write_base(tmp_path), "full")
    torch.testing.assert_close(outputs(model, IDS[:, :7]), outputs(model)[:, :7])


@pytest.mark.parametrize("layers", [0, 4, -1])
def test_num_layers_out_of_range(layers: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"num_layers: {layers} of 3"):
        load_backbone(str(write_base(tmp_path)), layers)


def test_no_backbone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: backbone does not load"):
        load_backbone(str(tmp_path / "nothing"))


def test_backbone_that_lacks_a_weight_is_not_filled_at_random(tmp_path: Path) -> None:
    path = write_base(tmp_path) / "model.safetensors"
    weights = load_file(path)
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: layers\.1\.mlp\.up_proj\.weight"):
        load_backbone(str(tmp_path))


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    path = write_base(tmp_path) / "model.safetensors"
    weights = load_file(path)
    weights["layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is \(3, 5\), its"):
        load_backbone(str(tmp_path))


def test_layers_that_are_left_out_are_no_news(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers has a page of its own about them; what else is not used is one line."""
    # What ran in this process before may have set up logging in a way of its own.
    caplog.set_level(logging.WARNING, log.name)
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    monkeypatch.setattr(log, "propagate", False)
    monkeypatch.setattr(log, "disabled", False)
    path = write_base(tmp_path) / "model.safetensors"
    caplog.clear()
    load_backbone(str(tmp_path), num_layers=1)
    assert caplog.messages == []
    assert "UNEXPECTED" not in capfd.readouterr().err
    save_file(load_file(path) | {"other.bias": torch.zeros(2)}, path, metadata={"format": "pt"})
    load_backbone(str(tmp_path), num_layers=1)
    assert caplog.messages == [f"{tmp_path}: 1 weights are not used, such as other.bias"]
    assert "UNEXPECTED" not in capfd.readouterr().err


@pytest.mark.parametrize("tune", TUNES)
def test_whoever_may_read_the_config_may_read_the_weights(tune: Tune, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(write_base(tmp_path / "base"), tune).save(out)
    modes = {file.name: file.stat().st_mode for file in out.iterdir()}
    assert len(modes) > 1
    assert set(modes.values()) == {modes["config.json"]}


def test_pickled_backbone_is_not_read(tmp_path: Path) -> None:
    path = write_base(tmp_path) / "model.safetensors"
    torch.save(load_file(path), tmp_path / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(CheckpointError, match="backbone does not load"):
        load_backbone(str(tmp_path))


def test_pickled_adapter_is_not_read(tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "out"
    build(base, "lora").save(out)
    path = out / "adapter_model.safetensors"
    torch.save(load_file(path), out / "adapter_model.bin")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        ValueModel.load(out, str(base))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("value_head.safetensors", None),
        ("value_head.safetensors", b"junk"),
        ("adapter_model.safetensors", b"junk"),
        ("adapter_model.safetensors", None),
        ("adapter_config.json", None),
    ],
)
def test_missing_or_broken_part(name: str, content: bytes | None, tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "out"
    build(base, "lora").save(out)
    (out / name).unlink()
    if content:
        (out / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{out}: "):
        ValueModel.load(out, str(base))


@pytest.mark.parametrize(
    "change",
    [{"fc.weight": torch.zeros(16, 16)}, {"extra": torch.zeros(1)}, {"fc.bias": None}],
)
def test_head_that_does_not_fit(change: dict[str, torch.Tensor | None], tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "out"
    build(base, "head").save(out)
    weights = load_file(out / "value_head.safetensors") | change
    weights = {name: w for name, w in weights.items() if w is not None}
    save_file(weights, out / "value_head.safetensors")
    with pytest.raises(CheckpointError, match=next(iter(change))):
        ValueModel.load(out, str(base))


def test_adapter_of_another_backbone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(write_base(tmp_path / "base"), "lora").save(out)
    other = write_base(tmp_path / "other", Qwen3Config, layers=2)
    with pytest.raises(CheckpointError, match="num_layers: 3 of 2"):
        ValueModel.load(out, str(other))


def test_adapter_with_missing_weights(tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "out"
    build(base, "lora").save(out)
    path = out / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="adapter"):
        ValueModel.load(out, str(base))

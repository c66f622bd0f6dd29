"""Texts with pictures are computed as plain transformers' whole model computes them.

Odds of passing by luck: hidden states of a tiny model spread by about 1, the tolerance is 1e-4.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny import GAMMA
from tests.support.tiny_vision import (
    BACKBONES,
    PLACEHOLDER,
    SIZES,
    picture,
    text_with,
    whole_hidden,
    write_backbone,
)
from trainer.training.backbone import WEIGHTS, Backbone, Tune
from value_server.contract.checkpoint import CheckpointError, LenvmConfig
from value_server.model.backbone import load_backbone, load_sight
from value_server.model.inputs import Pictures
from value_server.model.sight import grid_of
from value_server.model.value_model import ValueHead, ValueModel

Made = tuple[list[int], list[dict[str, Tensor]]]


def value_model(base: Path, layers: int = 3, tune: Tune = "head") -> ValueModel:
    config = LenvmConfig(
        gamma=GAMMA,
        base_model=str(base),
        weights=WEIGHTS[tune],
        num_layers=layers,
        tokenizer_fingerprint="f",
        pictures=True,
    )
    return Backbone(model=str(base), tune=tune).build(config, torch.float32).eval()


def text_of(model: ValueModel, name: str, numbers: list[int]) -> Made:
    """Tokens of a text with these pictures, and their pixels."""
    assert model.sight
    pixels = [model.sight.pixels(picture(n, *SIZES[n % 3])) for n in numbers]
    rows = [len(model.sight.look(one).rows) for one in pixels]
    return text_with(rows, 4 if name in ("smolvlm", "idefics3") else None), pixels


def pictures_of(model: ValueModel, texts: list[Made]) -> tuple[Tensor, Tensor, Pictures]:
    """ids, positions and pictures of texts packed in a row."""
    assert model.sight
    ids = torch.tensor([[token for tokens, _ in texts for token in tokens]])
    positions = torch.cat([torch.arange(len(tokens)) for tokens, _ in texts])[None]
    axes = []
    for tokens, pixels in texts:
        grids = [grid for one in pixels if (grid := grid_of(one))]
        axes.append(model.sight.positions(tokens, grids))
    turned = torch.cat(axes, dim=-1)[:, None] if model.sight.axes > 1 else None
    pixels = [one for _, own in texts for one in own]
    return ids, positions, Pictures(ids == PLACEHOLDER, pixels, turned)


@torch.inference_mode()
def hidden(model: ValueModel, texts: list[Made]) -> Tensor:
    """(T, H) of texts packed in a row."""
    ids, positions, pictures = pictures_of(model, texts)
    seen = pictures if pictures.pixels else None
    return model.hidden(ids, positions, pictures=seen)[0]


@pytest.mark.parametrize("name", BACKBONES)
def test_it_is_plain_transformers(name: str, tmp_path: Path) -> None:
    whole = write_backbone(tmp_path, name)
    model = value_model(tmp_path)
    for numbers in ([], [0], [1], [0, 1, 2], [2, 0, 2]):
        text = text_of(model, name, numbers)
        expected = whole_hidden(whole, *text)
        torch.testing.assert_close(hidden(model, [text]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_packed_texts_do_not_see_each_others_pictures(name: str, tmp_path: Path) -> None:
    write_backbone(tmp_path, name)
    model = value_model(tmp_path)
    texts = [text_of(model, name, numbers) for numbers in ([0], [], [1, 2], [2], [])]
    alone = torch.cat([hidden(model, [text]) for text in texts])
    torch.testing.assert_close(hidden(model, texts), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_picture_decides(name: str, tmp_path: Path) -> None:
    """The bug guarded against: two pictures with equal placeholders that count as one."""
    write_backbone(tmp_path, name)
    model = value_model(tmp_path)
    tokens, pixels = text_of(model, name, [0])
    _, other = text_of(model, name, [3])
    assert tokens == text_of(model, name, [3])[0]
    apart = hidden(model, [(tokens, pixels)]) - hidden(model, [(tokens, other)])
    first = tokens.index(PLACEHOLDER)
    assert apart[:first].abs().max() < 1e-5
    assert apart[first:].norm(dim=-1).min() > 0.01


@pytest.mark.parametrize("tune", ["full", "lora", "head"])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_checkpoint_is_read_back(name: str, tune: Tune, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    write_backbone(base, name)
    model = value_model(base, 2, tune)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    model.save(out)
    assert not any("vision" in f.name or f.suffix == ".bin" for f in out.iterdir())
    again = ValueModel.load(out, str(base))
    text = text_of(model, name, [0, 1])
    torch.testing.assert_close(hidden(again, [text]), hidden(model, [text]), rtol=1e-4, atol=1e-4)
    assert again.sight
    assert again.lenvm.pictures
    assert type(again.backbone).__name__ == type(load_backbone(str(base), sees=True)).__name__


def test_the_image_processor_of_the_checkpoint_is_taken(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    write_backbone(base, "qwen2.5-vl")
    model = value_model(base)
    model.save(out)
    path = base / "preprocessor_config.json"
    path.write_text(path.read_text().replace(str(112 * 112), str(56 * 56)))
    rows = []
    for one in (model, ValueModel.load(out, str(base)), value_model(base)):
        assert one.sight
        rows.append(len(one.sight.look(one.sight.pixels(picture())).rows))
    assert rows[0] == rows[1] > rows[2]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    write_backbone(tmp_path, "qwen2.5-vl")
    model = value_model(tmp_path)
    ids, positions, pictures = pictures_of(model, [text_of(model, "qwen2.5-vl", [0, 1])])
    with pytest.raises(ValueError, match=r"pictures: 1 with 6 rows for \d+ placeholder tokens"):
        model(ids, positions, pictures=replace(pictures, pixels=pictures.pixels[:1]))
    lenvm = LenvmConfig(**{f: getattr(model.lenvm, f) for f in model.lenvm.__struct_fields__})
    blind = ValueModel(model.backbone, ValueHead(32), lenvm)
    with pytest.raises(ValueError, match="pictures: given to a value model that sees none"):
        blind(ids, positions, pictures=pictures)


def test_a_model_without_eyes(tmp_path: Path) -> None:
    from tests.value_server.model.test_model import write_base

    with pytest.raises(CheckpointError, match=r"pictures does not load: model_type: 'llama'"):
        load_sight(str(write_base(tmp_path)))


def test_pictures_are_no_part_of_the_gradient(tmp_path: Path) -> None:
    write_backbone(tmp_path, "qwen3-vl")
    model = value_model(tmp_path, tune="lora").train()
    ids, positions, pictures = pictures_of(model, [text_of(model, "qwen3-vl", [0])])
    model(ids, positions, pictures=pictures).sum().backward()
    trained: dict[str, Any] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("sight") for name in trained)
    assert all(grad is not None for grad in trained.values())

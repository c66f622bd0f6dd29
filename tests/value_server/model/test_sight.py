"""What sees: positions of plain transformers, rows that differ, nothing that trains.

That rows, positions and masks together are right is in test_inputs.py.
"""

from pathlib import Path

import pytest
import torch

from tests.support.tiny_vision import (
    BACKBONES,
    PLACEHOLDER,
    SIZES,
    picture,
    text_with,
    write_backbone,
)
from value_server.model.sight import Sight


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_positions_are_those_of_plain_transformers(name: str, tmp_path: Path) -> None:
    model = write_backbone(tmp_path, name)
    sight = Sight(type(model).from_pretrained(tmp_path), str(tmp_path))
    seen = [sight.look(sight.pixels(picture(i, *SIZES[i]))) for i in range(3)]
    grids = [one.grid for one in seen if one.grid]
    tokens = text_with([len(one.rows) for one in seen])
    ids = torch.tensor([tokens])
    expected, _ = model.get_rope_index(ids, (ids == PLACEHOLDER).int(), torch.tensor(grids))
    for end in range(len(tokens) + 1):  # within a picture, too
        assert sight.positions(tokens[:end], grids).equal(expected[:, 0, :end])
    more = [*tokens, PLACEHOLDER, 33]  # a placeholder that is no picture's
    ends = sight.positions(more, grids)[:, -2:]
    assert ends.equal(expected[:, 0, -1:] + torch.tensor([1, 2]))


@pytest.mark.parametrize("name", BACKBONES)
def test_pictures_differ_and_nothing_trains(name: str, tmp_path: Path) -> None:
    model = write_backbone(tmp_path, name)
    sight = Sight(type(model).from_pretrained(tmp_path), str(tmp_path)).train()
    one, other = (sight.look(sight.pixels(picture(i))) for i in range(2))
    assert one.rows.shape == other.rows.shape
    assert (one.rows - other.rows).norm() > 0.1 * one.rows.norm()
    assert not any(parameter.requires_grad for parameter in sight.parameters())
    assert not any(part.training for part in sight.modules())
    assert not one.rows.requires_grad


def test_deep_rows_are_of_layers_that_are_there(tmp_path: Path) -> None:
    model = write_backbone(tmp_path, "qwen3-vl")
    config = model.config
    config.text_config.num_hidden_layers = 1
    sight = Sight(type(model).from_pretrained(tmp_path, config=config), str(tmp_path))
    deep = sight.look(sight.pixels(picture())).deep
    assert deep is not None
    assert len(deep) == 1


def test_a_family_that_is_not_known(tmp_path: Path) -> None:
    model = write_backbone(tmp_path, "llava")
    model.config.model_type = "llava_next"
    with pytest.raises(ValueError, match=r"model_type: 'llava_next'.* gemma3, idefics3, llava"):
        Sight(model, str(tmp_path))

"""Rows, positions and masks of pictures are those of plain transformers' whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny_vision import BACKBONES, PLACEHOLDER, picture, placeholders, write_backbone
from value_server.model.sight import Seen, Sight

SIZES = ((90, 60), (40, 100), (64, 64))


def texts(seen: list[Seen], tile: int | None) -> list[int]:
    """A text with these pictures."""
    found = [5, 6, 7]
    for number, one in enumerate(seen):
        found += [*placeholders(len(one.rows), tile), 10 + number, 20 + number]
    return [*found, 30, 31, 32]


@torch.inference_mode()
def whole(model: Any, tokens: list[int], pixels: list[dict[str, Tensor]]) -> Tensor:
    """(T, H) by plain transformers, everything at once."""
    ids = torch.tensor([tokens])
    is_row = (ids == PLACEHOLDER).long()
    given: dict[str, Any] = {}
    for name in pixels[0] if pixels else ():
        parts = [one[name] for one in pixels]
        along = 1 if name in ("pixel_values", "pixel_attention_mask") and parts[0].ndim > 4 else 0
        along = 1 if name == "pixel_attention_mask" else along
        given[name] = torch.cat(parts, dim=along)
    if model.config.model_type.startswith("qwen"):
        given["mm_token_type_ids"] = is_row
    if model.config.model_type == "gemma3":
        given["token_type_ids"] = is_row
    output: Tensor = model(ids, use_cache=False, **given).last_hidden_state
    return output[0]


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("name", BACKBONES)
def test_by_hand(name: str, count: int, tmp_path: Path) -> None:
    from transformers.masking_utils import create_masks_for_generate

    model = write_backbone(tmp_path, name)
    decoder = model.get_decoder()
    sight = Sight(type(model).from_pretrained(tmp_path).eval(), str(tmp_path))
    pixels = [sight.pixels(picture(i, *SIZES[i])) for i in range(count)]
    seen = [sight.look(one) for one in pixels]
    tile = 1 if name in ("smolvlm", "idefics3") else None
    tokens = texts(seen, tile)
    expected = whole(model, tokens, pixels)
    ids = torch.tensor([tokens])
    embeds = decoder.get_input_embeddings()(ids)
    places = ids == sight.placeholder
    more: dict[str, Any] = {}
    if seen:
        embeds[places] = torch.cat([one.rows for one in seen])
    if seen and seen[0].deep is not None:
        more["visual_pos_masks"] = places
        more["deepstack_visual_embeds"] = list(torch.cat([s.deep for s in seen], dim=1))
    positions = sight.positions(tokens, [s.grid for s in seen if s.grid])
    if sight.axes == 3:
        positions = torch.cat([torch.arange(len(tokens))[None], positions])
    if sight.whole and seen:
        starts = places & ~torch.nn.functional.pad(places, (1, 0))[:, :-1]
        blocks = torch.where(places, starts.cumsum(1), -1)
        more["attention_mask"] = create_masks_for_generate(
            decoder.config, embeds, None, None, positions[None], block_sequence_ids=blocks
        )
    with torch.inference_mode():
        found = decoder(
            inputs_embeds=embeds,
            position_ids=positions[:, None] if sight.axes == 3 else positions[None],
            use_cache=False,
            **more,
        ).last_hidden_state[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_positions_are_those_of_plain_transformers(name: str, tmp_path: Path) -> None:
    model = write_backbone(tmp_path, name)
    sight = Sight(type(model).from_pretrained(tmp_path), str(tmp_path))
    seen = [sight.look(sight.pixels(picture(i, *SIZES[i]))) for i in range(3)]
    grids = [one.grid for one in seen if one.grid]
    tokens = texts(seen, None)
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

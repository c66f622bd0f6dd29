"""What a decoder takes of texts with pictures.

Legend: B rows, T tokens of a row, n rows of a picture, H hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

from value_server.model.sight import Sight


@dataclass(frozen=True)
class Pictures:
    """Those of a batch.

    places: (B, T), whether a row of a picture takes a token's place.
    pixels: of each picture, as `Sight.pixels` makes them, in the order of their places.
    positions: (3, B, T) where the sight has three axes.
    """

    places: Tensor
    pixels: Sequence[Mapping[str, Tensor]]
    positions: Tensor | None = None


def decoder_inputs(
    decoder: Any, sight: Sight, input_ids: Tensor, position_ids: Tensor | None, pictures: Pictures
) -> dict[str, Any]:
    """Keyword arguments of the decoder, in place of (B, T) ids and position_ids.

    Positions that restart at 0 mark packed texts. Raises ValueError where the places are not as
    many as the rows.
    """
    places = pictures.places
    seen = [sight.look(pixels) for pixels in pictures.pixels]
    rows = torch.cat([one.rows for one in seen])
    if len(rows) != (count := int(places.sum())):
        raise ValueError(
            f"pictures: {len(seen)} with {len(rows)} rows for {count} placeholder tokens, must be "
            "as many; do the served model's image processor and this one make the same sizes?"
        )
    embeds = decoder.get_input_embeddings()(input_ids.masked_fill(places, 0))
    embeds = embeds.masked_scatter(places[..., None], rows.to(embeds.dtype))
    given: dict[str, Any] = {"inputs_embeds": embeds, "position_ids": position_ids}
    if sight.axes > 1:
        given["position_ids"] = with_axes(input_ids, position_ids, pictures.positions)
    if deep := [one.deep for one in seen if one.deep is not None]:
        given["visual_pos_masks"] = places
        given["deepstack_visual_embeds"] = list(torch.cat(deep, dim=1))
    if sight.whole:
        given["attention_mask"] = create_masks_for_vision_model(
            decoder.config, embeds, None, None, position_ids, _blocks(places)
        )
    return given


def with_axes(input_ids: Tensor, position_ids: Tensor | None, axes: Tensor | None) -> Tensor:
    """(4, B, T) for Qwen's decoders: the first tell packed texts apart, the others turn."""
    texts = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    texts = texts if position_ids is None else position_ids
    return torch.cat([texts[None], texts.expand(3, -1, -1) if axes is None else axes])


def _blocks(places: Tensor) -> Tensor:
    """(B, T) a number for each run of places, -1 elsewhere: what of it sees all of it."""
    before = nn.functional.pad(places, (1, 0))[:, :-1]
    return torch.where(places, (places & ~before).cumsum(1), -1)

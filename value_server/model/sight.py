"""What of a vision-language backbone sees: tower, projector, image processor.

Legend: T tokens of a text, n rows of a picture, H hidden size of the decoder, L its first layers.
A picture's n rows take the places of the next n placeholder tokens of a text, in order, even where
other tokens stand between them (tiles). A placeholder beyond the last row is a token as any other.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, BatchFeature, PreTrainedModel

if TYPE_CHECKING:
    from PIL import Image

Grid = tuple[int, int, int]

# Families whose rows, positions and masks are known here to be those of plain transformers.
FAMILIES = ("gemma3", "idefics3", "llava", "qwen2_5_vl", "qwen3_vl", "smolvlm")


@dataclass(frozen=True)
class Seen:
    """A picture as the decoder takes it.

    rows: (n, H) embeddings in place of its placeholder tokens.
    deep: (L, n, H) that Qwen3-VL adds behind its first L layers; else None.
    grid: (t, h, w) in patches, as transformers' image_grid_thw, for Qwen's positions; else None.
    """

    rows: Tensor
    deep: Tensor | None = None
    grid: Grid | None = None


class Sight(nn.Module):
    """Frozen; `tower` is the backbone without its decoder.

    placeholder: id of the token that stands for one row of a picture.
    whole: whether the tokens of one picture see each other, later ones too (Gemma 3).
    axes: parts of a position: 3 in Qwen's decoders, else 1.
    """

    def __init__(self, model: PreTrainedModel, source: str, layers: int | None = None) -> None:
        """model: the whole backbone, which loses its decoder; source: whose image processor is
        taken; layers: of the decoder in use, if not those of `model`. Raises ValueError, OSError
        where it is none that sees, or has no processor."""
        super().__init__()
        check_family(model.config.model_type)
        self.processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        decoder = model.get_decoder()
        name = next(name for name, part in model.named_children() if part is decoder)
        setattr(model, name, nn.Identity())
        self.tower = model.requires_grad_(False).eval()
        self.placeholder = int(model.config.image_token_id)
        self.whole = model.config.model_type == "gemma3"
        self.axes = 3 if hasattr(model, "get_rope_index") else 1
        self._layers = layers or decoder.config.num_hidden_layers
        self._takes = inspect.signature(model.get_image_features).parameters.keys()

    def train(self, mode: bool = True) -> "Sight":
        """It never trains."""
        return super().train(False)

    def pixels(self, picture: "Image.Image") -> dict[str, Tensor]:
        """What `look` takes, on the CPU. No model runs, so a worker can do it."""
        made: BatchFeature = self.processor(images=picture, return_tensors="pt")
        return {name: part for name, part in made.items() if name in self._takes}

    @torch.no_grad()
    def look(self, pixels: Mapping[str, Tensor]) -> Seen:
        """By tower and projector, on their device."""
        first = next(self.tower.parameters())
        given = {
            name: part.to(first.device, first.dtype if part.is_floating_point() else None)
            for name, part in pixels.items()
        }
        found = self.tower.get_image_features(**given, return_dict=True)
        deep = getattr(found, "deepstack_features", None)
        return Seen(
            _joined(found.pooler_output),
            torch.stack([_joined(part) for part in deep[: self._layers]]) if deep else None,
            grid_of(pixels),
        )

    def positions(self, tokens: Sequence[int], grids: Sequence[Grid]) -> Tensor:
        """(T,) positions of a text, or (3, T) where a picture's rows have three; grids: of its
        pictures, in order. A text may end within a picture."""
        if self.axes == 1:
            return torch.arange(len(tokens))
        merge = self.tower.config.vision_config.spatial_merge_size
        parts, start, position = [], 0, 0
        for t, h, w in grids:
            try:
                place = tokens.index(self.placeholder, start)
            except ValueError:
                break
            parts.append(torch.arange(place - start).expand(3, -1) + position)
            position += place - start
            sides = [torch.arange(n) for n in (t, h // merge, w // merge)]
            parts.append(torch.stack(torch.meshgrid(*sides, indexing="ij")).flatten(1) + position)
            position += max(h, w) // merge
            start = place + parts[-1].shape[1]
        parts.append(torch.arange(max(len(tokens) - start, 0)).expand(3, -1) + position)
        return torch.cat(parts, dim=1)[:, : len(tokens)]


def grid_of(pixels: Mapping[str, Tensor]) -> Grid | None:
    """(t, h, w) of a picture, where the family has one."""
    if (grid := pixels.get("image_grid_thw")) is None:
        return None
    t, h, w = grid[0].tolist()
    return t, h, w


def check_family(model_type: str) -> None:
    """Raises ValueError unless its pictures are known to be seen as plain transformers does."""
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model_type: {model_type!r}, pictures are seen by {known} only")


def _joined(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """(n, H) of the tiles of one picture."""
    parts = list(rows)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])

"""Texts with pictures as a value model takes them.

Legend: L tokens of a pack, B packs of a batch. Beside what packs have anyway, a batch has `places`
(B, L), the placeholder tokens of prompts; `pictures`, what `Sight.pixels` makes of each, in order;
and for Qwen `axes` (3, B, L), positions in three parts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from trainer.data import Example, PackedDataset, collate
from value_server.model.inputs import Pictures
from value_server.model.pictures import open_picture
from value_server.model.sight import Sight, grid_of

Item = dict[str, Any]


class SeenPacks(Dataset[Item]):
    """Packs with the pictures of their texts."""

    def __init__(self, packs: PackedDataset, sight: Sight) -> None:
        self.packs, self.sight = packs, sight

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Item:
        item: Item = dict(self.packs[index])
        members = self.packs.packs[index] if index >= 0 else []  # below 0: a pack of nothing
        if not members:
            return item | _blank(item["input_ids"], self.sight)
        return item | item_of([self.packs.examples[i] for i in members], self.sight)


def item_of(examples: Sequence[Example], sight: Sight) -> Item:
    """Of one pack. Raises ValueError naming the prompt of a picture that cannot be read."""
    places, axes, pictures = [], [], []
    for example in examples:
        ids = torch.from_numpy(example.input_ids)
        rollout = example.rollout
        pixels = [
            sight.pixels(open_picture(p.data, f"prompt {rollout.prompt_id}: pictures[{number}]"))
            for number, p in enumerate(rollout.pictures)
        ]
        rows = ids == sight.placeholder
        rows[len(rollout.prompt_ids) :] = False
        places.append(rows & bool(pixels))
        grids = [grid for one in pixels if (grid := grid_of(one))]
        axes.append(sight.positions(ids.tolist(), grids))
        pictures += pixels
    own: Item = {"places": torch.cat(places), "pictures": pictures}
    return own | ({"axes": torch.cat(axes, dim=-1)} if sight.axes > 1 else {})


def _blank(ids: Tensor, sight: Sight) -> Item:
    own: Item = {"places": torch.zeros_like(ids, dtype=torch.bool), "pictures": []}
    axes = torch.zeros(sight.axes, len(ids), dtype=torch.int64)
    return own | ({"axes": axes} if sight.axes > 1 else {})


def collate_seen(items: list[Item]) -> Item:
    """A row for each pack, as `collate` makes it, and the pictures of all."""
    if "places" not in items[0]:
        return dict(collate(items))
    flat = [{k: v for k, v in i.items() if k not in ("pictures", "axes")} for i in items]
    batch: Item = dict(collate(flat)) | {"pictures": [p for i in items for p in i["pictures"]]}
    if "axes" in items[0]:
        longest = batch["places"].shape[1]
        axes = [item["axes"] for item in items]
        batch["axes"] = torch.stack([pad(a, (0, longest - a.shape[1])) for a in axes], dim=1)
    return batch


def pictures_of(batch: Mapping[str, Any]) -> Pictures | None:
    """Of a batch, for the value model; None where it has none."""
    if not batch.get("pictures"):
        return None
    return Pictures(batch["places"], batch["pictures"], batch.get("axes"))


def pictures_of_text(
    example: Example, sight: Sight | None, device: torch.device
) -> Pictures | None:
    """Of one text alone; None where the model sees none, or the text ends within its prompt."""
    if sight is None or not example.rollout.pictures or not example.has_labels:
        return None
    item = item_of([example], sight)
    axes = item["axes"][:, None].to(device) if "axes" in item else None
    return Pictures(item["places"][None].to(device), item["pictures"], axes)

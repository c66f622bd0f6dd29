"""What selfcheck.py asks, asked of a text with a picture, where the model sees."""

import logging
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from value_server.engine.job import Job, Row
from value_server.engine.selfcheck import FIRST, off_by, text
from value_server.model.inputs import Pictures
from value_server.model.sight import Sight
from value_server.model.value_model import ValueModel

if TYPE_CHECKING:
    from value_server.engine.engine import Engine

log = logging.getLogger(__name__)

NAME = "picture check"
SIDE = 64  # of the picture; image processors make of it what they like


class PictureCheck:
    """Made before the engine changes the backbone, run after it. Raises what models raise."""

    @torch.inference_mode()
    def __init__(self, model: ValueModel, sight: Sight) -> None:
        self._pixels = sight.pixels(Image.radial_gradient("L").resize((SIDE, SIDE)).convert("RGB"))
        seen = sight.look(self._pixels)
        ids = text(model)[::-1]  # else it would share slots with the other check's
        self._ids = [*ids[:FIRST], *[sight.placeholder] * len(seen.rows), *ids[FIRST:]]
        rows = torch.tensor([self._ids], device=model.backbone.device)
        positions = None
        if seen.grid is not None:
            positions = sight.positions(self._ids, [seen.grid])[:, None].to(rows.device)
        shown = Pictures(rows == sight.placeholder, [self._pixels], positions)
        model.backbone.set_attn_implementation("eager")
        self._expected = model.hidden(rows, pictures=shown)[0].float()

    def run(self, engine: "Engine", session: str) -> None:
        """Raises ValueError unless the engine gives what plain transformers gave."""
        most = min(engine.cache.largest, engine.max_position)
        if engine.showing is None or len(self._ids) > most:
            log.warning("a picture takes %d tokens, a text has at most %d", len(self._ids), most)
            return
        engine.showing.look(NAME, self._pixels)
        hidden: list[Tensor] = []
        hook = engine.model.head.register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
        try:
            engine.run(Job([Row(session, 0, self._ids, pictures=[NAME])]))
        finally:
            hook.remove()
            engine.showing.store.forget(NAME)
        wrong, limit = off_by(engine.model, self._expected, torch.cat(hidden))
        if not wrong <= limit:
            raise ValueError(
                "with a picture its hidden states differ from plain transformers by "
                f"{wrong:.1%}, more than {limit:.1%}"
            )

"""Predictions kept as they are made: a run that was stopped goes on with the texts that are left.

A record is the index of a text, the number of its logits (both int64), and these in float32. A
last one that was not written whole is dropped.
"""

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data import Rollout, digest, make_example
from value_server.model.value_model import ValueModel

HEADER = struct.Struct("<qq")


@dataclass(frozen=True, slots=True)
class Journal:
    """A file of logits by index of text; None keeps nothing."""

    path: Path | None

    @classmethod
    def of(
        cls, checkpoint: Path, model: ValueModel, rollouts: Sequence[Rollout], max_length: int
    ) -> "Journal":
        """In `checkpoint`, if that can be written to: of this model's values of these texts."""
        if not os.access(checkpoint, os.W_OK):
            return cls(None)
        weights = [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns)
            for file in sorted(checkpoint.glob("*.safetensors"))
        ]
        source, place = model.config._name_or_path, next(model.backbone.parameters())
        texts = digest([make_example(rollout, max_length) for rollout in rollouts])
        facts = (weights, source, place.dtype, place.device.type, texts)
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        return cls(checkpoint / f"predictions-{key}.part")

    def read(self) -> dict[int, NDArray[np.float32]]:
        """What was written whole."""
        if self.path is None or not self.path.exists():
            return {}
        content, at, found = self.path.read_bytes(), 0, {}
        while at + HEADER.size <= len(content):
            index, size = HEADER.unpack_from(content, at)
            end = at + HEADER.size + 4 * size
            if end > len(content):
                break
            logits = np.frombuffer(content, np.float32, size, at + HEADER.size)
            found[index] = logits.copy()
            at = end
        os.truncate(self.path, at)
        return found

    def write(self, index: int, logits: NDArray[np.float32]) -> None:
        """Append one text's."""
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(HEADER.pack(index, len(logits)) + logits.tobytes())

    def remove(self) -> None:
        """The run has ended."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

"""Predictions kept as they are made, for a run that was stopped."""

import os
from collections.abc import Sequence
from pathlib import Path

from trainer.data import Rollout, make_example
from trainer.digests import digest
from trainer.resume import fingerprint
from trainer.rollout_files import check_ids
from trainer.rows import Rows
from value_server.model.value_model import ValueModel


def open_journal(
    checkpoint: Path, model: ValueModel, rollouts: Sequence[Rollout], max_length: int
) -> Rows:
    """Of this model's values of these texts, in `checkpoint` if that can be written to.

    Raises ValueError for a token that the model does not know.
    """
    check_ids(rollouts, model.backbone.get_input_embeddings().num_embeddings, checkpoint)
    if not os.access(checkpoint, os.W_OK):
        return Rows(None)
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(checkpoint.glob("*.safetensors"))
    ]
    source, place = model.config._name_or_path, next(model.backbone.parameters())
    texts = digest([make_example(rollout, max_length) for rollout in rollouts])
    key = fingerprint([weights, source, str(place.dtype), place.device.type, texts])
    return Rows(checkpoint / f"predictions-{key}.jsonl")


def close_journal(journal: Rows) -> None:
    """The run has ended."""
    journal.close()
    if journal.path:
        journal.path.unlink(missing_ok=True)

"""Digests of rollouts and examples: what they are the same by."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

from trainer.data import Example, Rollout


def prompt_hashes(rollouts: Sequence[Rollout]) -> list[str]:
    """Sorted hashes of the different prompts. Of data that overlap, the first ones do as well."""
    prompts = {r.prompt_ids.astype(np.int64).tobytes() + seen(r) for r in rollouts}
    return sorted(hashlib.sha256(prompt).hexdigest()[:16] for prompt in prompts)


def digest(examples: Sequence[Example]) -> str:
    """sha256 over texts, labels, weights and their order."""
    total = hashlib.sha256()
    for example in examples:
        for array in (example.input_ids, example.labels):
            total.update(len(array).to_bytes(8, "big") + array.tobytes())
        total.update(bytes([example.is_cut]) + seen(example.rollout))
        if (weight := example.rollout.weight) != 1:  # so that runs of before there was any go on
            total.update(struct.pack(">d", weight))
        if (c := example.candidates) is not None:
            for array in (c.positions, c.ids, c.p, c.z):
                total.update(array.tobytes())
    return total.hexdigest()


def seen(rollout: Rollout) -> bytes:
    """Of the pictures of its prompt; nothing where it has none."""
    return b"".join(bytes.fromhex(picture.sha256) for picture in rollout.pictures)

"""The values that a model gives to the tokens of rollouts."""

import base64
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from trainer.data import Rollout, make_example
from trainer.reading import Reading
from trainer.rows import Rows
from trainer.seen import pictures_of_text
from value_server.model.value_model import ValueModel


def predict_all(
    model: ValueModel, rollouts: Sequence[Rollout], reading: Reading, name: str, journal: Rows
) -> list[NDArray[np.float32]]:
    """Of each rollout the logits of `predict`; what is in the journal already is not repeated.

    name: for the progress bar.
    """
    left = [index for index in range(len(rollouts)) if str(index) not in journal]
    bar = {"desc": name, "unit": "text", "total": len(rollouts), "disable": reading.only_json}
    for index in tqdm(left, initial=len(journal), **bar):
        z = predict(model, rollouts[index], reading.max_length)
        journal.add({"key": str(index), "logits": base64.b64encode(z.tobytes()).decode()})
    kept = (base64.b64decode(journal[str(index)]["logits"]) for index in range(len(rollouts)))
    return [np.frombuffer(content, np.float32).copy() for content in kept]


@torch.inference_mode()
def predict(model: ValueModel, rollout: Rollout, max_length: int) -> NDArray[np.float32]:
    """(T,) logits over prompt and completion, T at most `max_length`."""
    example = make_example(rollout, max_length)
    place = next(model.parameters()).device
    ids = torch.from_numpy(example.input_ids)[None].to(place)
    pictures = pictures_of_text(example, model.sight, place)
    z: NDArray[np.float32] = model(ids, pictures=pictures)[0].cpu().numpy()
    return z

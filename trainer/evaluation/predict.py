"""The values that a model gives to the tokens of rollouts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from trainer.data import Rollout, make_example
from trainer.evaluation.journal import Journal
from value_server.model.value_model import ValueModel, default_dtype

Precision = Literal["auto", "float32", "bfloat16"]


def device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(checkpoint: Path, base_model: str | None, dtype: Precision) -> ValueModel:
    """The checkpoint on `device`, its backbone in `dtype`."""
    chosen = default_dtype(device()) if dtype == "auto" else getattr(torch, dtype)
    return ValueModel.load(checkpoint, base_model, chosen).to(device())


def predict_all(
    model: ValueModel,
    rollouts: Sequence[Rollout],
    max_length: int,
    name: str,
    quiet: bool,
    journal: Journal | None = None,
) -> list[NDArray[np.float32]]:
    """Of each rollout the logits of `predict`; what is in the journal already is not repeated."""
    done = journal.read() if journal else {}
    left = [index for index in range(len(rollouts)) if index not in done]
    progress = {"desc": name, "unit": "text", "total": len(rollouts), "disable": quiet}
    for index in tqdm(left, initial=len(done), **progress):
        done[index] = predict(model, rollouts[index], max_length)
        if journal:
            journal.write(index, done[index])
    return [done[index] for index in range(len(rollouts))]


@torch.inference_mode()
def predict(model: ValueModel, rollout: Rollout, max_length: int) -> NDArray[np.float32]:
    """(T,) logits over prompt and completion, T at most `max_length`."""
    example = make_example(rollout, max_length)
    place = next(model.parameters()).device
    z: NDArray[np.float32] = (
        model(torch.from_numpy(example.input_ids)[None].to(place))[0].cpu().numpy()
    )
    return z

"""The values that a model gives to the tokens of rollouts."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from trainer.data import Rollout, make_example
from value_server.model import ValueModel


def predict_all(
    model: ValueModel, rollouts: Sequence[Rollout], max_length: int, name: str, quiet: bool
) -> list[NDArray[np.float32]]:
    """Of each rollout the logits of `predict`, on a GPU if there is one."""
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    progress = tqdm(rollouts, desc=name, unit="text", disable=quiet)
    return [predict(model, rollout, max_length) for rollout in progress]


@torch.inference_mode()
def predict(model: ValueModel, rollout: Rollout, max_length: int) -> NDArray[np.float32]:
    """(T,) logits over prompt and completion, T at most `max_length`."""
    example = make_example(rollout, max_length)
    device = next(model.parameters()).device
    z: NDArray[np.float32] = (
        model(torch.from_numpy(example.input_ids)[None].to(device))[0].cpu().numpy()
    )
    return z

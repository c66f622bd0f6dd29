"""The values that a model gives to the tokens of rollouts."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from cyclopts import Parameter
from numpy.typing import NDArray
from tqdm import tqdm

from trainer.checks import check, check_choice
from trainer.data import Rollout, make_example
from trainer.output import OnlyJson
from trainer.rows import Rows
from value_server.model.value_model import ValueModel, default_dtype

Precision = Literal["auto", "float32", "bfloat16"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a checkpoint is loaded, how far it reads, and what is printed meanwhile."""

    base_model: str | None = None
    """Where backbone and tokenizer lie, if not where the checkpoint says."""
    max_length: int = 3000
    """Tokens of a text that are looked at."""
    dtype: Precision = "auto"
    """Of the backbone; auto is that of `lenvm serve`: bfloat16 where the device has it."""
    only_json: OnlyJson = False

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        check(self.max_length > 1, "max_length", self.max_length, "above 1")
        check_choice("dtype", self.dtype, get_args(Precision))

    def load(self, checkpoint: Path) -> ValueModel:
        """On a GPU if there is one."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = default_dtype(device) if self.dtype == "auto" else getattr(torch, self.dtype)
        return ValueModel.load(checkpoint, self.base_model, dtype).to(device)


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
    z: NDArray[np.float32] = (
        model(torch.from_numpy(example.input_ids)[None].to(place))[0].cpu().numpy()
    )
    return z

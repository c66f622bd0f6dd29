"""How a checkpoint is read by the commands that judge or ask it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from cyclopts import Parameter

from trainer.checks import check, check_choice, check_positions
from trainer.output import OnlyJson
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
        """On a GPU if there is one. Raises ValueError where it reads less far than max_length."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = default_dtype(device) if self.dtype == "auto" else getattr(torch, self.dtype)
        model = ValueModel.load(checkpoint, self.base_model, dtype)
        check_positions(self.max_length, model.config, checkpoint)
        return model.to(device)

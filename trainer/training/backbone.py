"""The backbone that a value model starts from, and which of its weights train."""

from dataclasses import dataclass
from typing import Literal

import torch
from cyclopts import Parameter
from transformers import AutoConfig

from trainer.checks import check, check_choice, check_positive
from value_server.contract.checkpoint import LenvmConfig
from value_server.model.value_model import ValueHead, ValueModel, load_backbone

Tune = Literal["full", "lora", "head"]
WEIGHTS: dict[Tune, str] = {"full": "full", "lora": "adapter", "head": "head"}


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """The adapter on every linear layer of the backbone."""

    rank: int = 32
    """Rank of the adapter."""
    alpha: int = 32
    """Its scale is alpha / rank."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A model of the hub or of a folder, and what of it trains beside the head."""

    model: str
    """Hub name or folder of the backbone to start from."""
    base_model: str | None = None
    """Name to write into the checkpoint, where it differs from MODEL."""
    num_layers: int | None = None
    """Layers of the backbone to keep, from the bottom; by default all."""
    tune: Tune = "full"
    """The full backbone, a LoRA adapter on it, or the head alone."""
    lora: LoraShape = LoraShape()

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        check_choice("tune", self.tune, WEIGHTS)
        check_positive(**{"lora.rank": self.lora.rank, "lora.alpha": self.lora.alpha})
        (depth, _), layers = load_shape(self.model), self.num_layers
        fits = layers is None or 1 <= layers <= depth
        check(fits, "num_layers", layers, f"1 to {depth}, as {self.model} has")

    def build(self, config: LenvmConfig, dtype: torch.dtype) -> ValueModel:
        """A fresh value model; dtype: of frozen weights, those that train are in float32."""
        frozen = self.tune != "full"
        backbone = load_backbone(self.model, config.num_layers, dtype if frozen else torch.float32)
        head = ValueHead(backbone.config.hidden_size)
        if frozen:
            backbone.requires_grad_(False)
        if self.tune == "lora":
            from peft import LoraConfig, get_peft_model

            rank, alpha = self.lora.rank, self.lora.alpha
            shape = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
            backbone = get_peft_model(backbone, shape)
        return ValueModel(backbone, head, config)


def load_shape(model: str) -> tuple[int, int]:
    """(layers, vocabulary size) of a backbone. Raises ValueError if there is none."""
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {model!r} does not load: {error}") from error
    return config.num_hidden_layers, config.vocab_size

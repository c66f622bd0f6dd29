"""The training loop: transformers' Trainer with the value loss.

Loss: token-averaged squared error between u = sigmoid(z) and 1 - gamma^r over every labelled
position (paper, Eq. 9). A lower bound counts only where the prediction falls below it.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from trainer.data import NO_LABEL
from value_server.contract.values import value_from_length, value_from_logit

TRAINED_FILE = "trained.safetensors"


def value_loss(z: Tensor, labels: Tensor, is_bound: Tensor, gamma: float) -> Tensor:
    """Sum of squared errors in u over labelled positions; all arguments (B, T)."""
    labelled = labels != NO_LABEL
    error = value_from_logit(z) - value_from_length(labels.clamp(min=0), gamma)
    error = torch.where(is_bound, error.clamp(max=0), error)
    return (error.square() * labelled).sum()


class ValueTrainer(Trainer):
    """Averages the loss over all labelled tokens of a global batch; a step saves what trains."""

    def __init__(self, *args: Any, gamma: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gamma = gamma
        self.model_accepts_loss_kwargs = True  # compute_loss divides by num_items_in_batch itself

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        z = model(inputs["input_ids"], position_ids=inputs["position_ids"])
        loss = value_loss(z, inputs["labels"], inputs["is_bound"], self.gamma)
        if num_items_in_batch is None:
            loss = loss / (inputs["labels"] != NO_LABEL).sum()
        else:
            # The count is that of all processes, their gradients are averaged.
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, z) if return_outputs else loss

    def _trained(self) -> dict[str, nn.Parameter]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().cpu().contiguous() for name, p in self._trained().items()}
        save_file(weights, folder / TRAINED_FILE)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / TRAINED_FILE)
        for name, parameter in self._trained().items():
            parameter.copy_(weights[name])

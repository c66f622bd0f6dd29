"""Train a value model on rollouts.

Loss: token-averaged squared error between u = sigmoid(z) and 1 - gamma^r over every labelled
position (paper, Eq. 9). A lower bound counts only where the prediction falls below it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from trainer.data import (
    NO_LABEL,
    Censored,
    PackedDataset,
    collate,
    make_example,
    read_rollouts,
    split,
)
from value_server.contract.checkpoint import LenvmConfig, tokenizer_fingerprint
from value_server.contract.values import gamma_from_length, value_from_length, value_from_logit
from value_server.model import ValueHead, ValueModel, default_dtype, load_backbone

Tune = Literal["full", "lora", "head"]
WEIGHTS: dict[Tune, str] = {"full": "full", "lora": "adapter", "head": "head"}


def value_loss(z: Tensor, labels: Tensor, is_bound: Tensor, gamma: float) -> Tensor:
    """Sum of squared errors in u over labelled positions; all arguments (B, T)."""
    labelled = labels != NO_LABEL
    error = value_from_logit(z) - value_from_length(labels.clamp(min=0), gamma)
    error = torch.where(is_bound, error.clamp(max=0), error)
    return (error.square() * labelled).sum()


class ValueTrainer(Trainer):
    """transformers' Trainer with the value loss, averaged over all tokens of a global batch."""

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
            num_items_in_batch = (inputs["labels"] != NO_LABEL).sum()
        loss = loss / num_items_in_batch
        return (loss, z) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or "")
        self.accelerator.unwrap_model(self.model).save(folder)


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """Rank and scale of the adapter on every linear layer of the backbone."""

    rank: int = 32
    alpha: int = 32


def build_model(
    source: str, config: LenvmConfig, tune: Tune, lora: LoraShape, dtype: torch.dtype
) -> ValueModel:
    """A fresh value model on a backbone; `tune` says which weights train beside the head."""
    frozen = tune != "full"
    backbone = load_backbone(source, config.num_layers, dtype if frozen else torch.float32)
    head = ValueHead(backbone.config.hidden_size)
    if frozen:
        backbone.requires_grad_(False)
    if tune == "lora":
        from peft import LoraConfig, get_peft_model

        shape = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear")
        backbone = get_peft_model(backbone, shape)
    return ValueModel(backbone, head, config)


def train(
    rollouts: Path,
    output: Path,
    *,
    model: str,
    base_model: str | None = None,
    num_layers: int | None = None,
    tune: Tune = "full",
    lora: LoraShape = LoraShape(),
    gamma: float | None = None,
    censored: Censored = "drop",
    holdout: float = 0.05,
    learning_rate: float = 2e-5,
    epochs: float = 2.0,
    max_steps: int = -1,
    tokens_per_step: int = 16384,
    max_length: int = 3000,
    warmup_steps: int = 50,
    bf16: bool | None = None,
    resume: bool = True,
    seed: int = 0,
) -> None:
    """Train a value model and write it to OUTPUT.

    Parameters
    ----------
    rollouts: Parquet file, or folder of shards, with prompt_ids, completion_ids, finish_reason.
    output: Folder of the checkpoint.
    model: Hub name or folder of the backbone to start from.
    base_model: Name to write into the checkpoint, where it differs from MODEL.
    num_layers: Layers of the backbone to keep, from the bottom (default: all).
    tune: full backbone, a LoRA adapter, or the head alone.
    gamma: Discount; by default 1 - gamma^L99 = 0.99 with L99 from the finished completions.
    censored: Completions cut by max_tokens: drop them, or use their length as a lower bound.
    holdout: Share of the prompts kept for `evaluate`.
    max_length: Tokens of a pack; a longer text loses its tail, its labels stay true.
    bf16: Mixed precision; by default where the device has it natively.
    resume: Go on from the last saved step in OUTPUT/steps.
    """
    set_seed(seed)
    if bf16 is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        bf16 = default_dtype(device) == torch.bfloat16
    if tokens_per_step < max_length:
        raise SystemExit(f"tokens_per_step: {tokens_per_step} is below max_length {max_length}")
    everything = read_rollouts(rollouts)
    train_part, _ = split(everything, holdout)
    finished = [len(r.completion_ids) for r in train_part if r.finished]
    gamma = gamma or gamma_from_length(float(np.percentile(finished, 99)))
    kept = [r for r in train_part if r.finished or censored == "bound"]
    dataset = PackedDataset([make_example(r, max_length) for r in kept], max_length, seed)
    depth = num_layers or load_depth(model)
    config = LenvmConfig(
        gamma=gamma,
        base_model=base_model or model,
        weights=WEIGHTS[tune],
        num_layers=depth,
        tokenizer_fingerprint=tokenizer_fingerprint(AutoTokenizer.from_pretrained(model)),
        training={
            "rollouts": rollouts.name,
            "completions": len(kept),
            "cut": sum(not r.finished for r in kept),
            "censored": censored,
            "learning_rate": learning_rate,
            "epochs": epochs,
            "max_steps": max_steps,
            "holdout": holdout,
            "seed": seed,
        },
    )
    value_model = build_model(model, config, tune, lora, torch.bfloat16 if bf16 else torch.float32)
    steps = output / "steps"
    arguments = TrainingArguments(
        output_dir=str(steps),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=tokens_per_step // max_length,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps,
        num_train_epochs=epochs,
        max_steps=max_steps,
        bf16=bf16,
        logging_steps=1,
        save_steps=50,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    trainer = ValueTrainer(
        value_model, arguments, train_dataset=dataset, data_collator=collate, gamma=gamma
    )
    trainer.train()
    value_model.save(output)


def load_depth(model: str) -> int:
    """Number of layers of a backbone."""
    from transformers import AutoConfig

    depth: int = AutoConfig.from_pretrained(model).num_hidden_layers
    return depth

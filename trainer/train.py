"""`lenvm train`: from rollouts to a checkpoint."""

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, TrainingArguments, set_seed

from trainer.data import (
    Censored,
    PackedDataset,
    collate,
    digest,
    make_example,
    read_rollouts,
    split,
)
from trainer.steps import open_steps
from trainer.value_trainer import ValueTrainer
from value_server.contract.checkpoint import LenvmConfig, tokenizer_fingerprint
from value_server.contract.values import gamma_from_length
from value_server.model import ValueHead, ValueModel, default_dtype, load_backbone

Tune = Literal["full", "lora", "head"]
WEIGHTS: dict[Tune, str] = {"full": "full", "lora": "adapter", "head": "head"}


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """The adapter on every linear layer of the backbone.

    Parameters
    ----------
    rank
        Rank of the adapter.
    alpha
        Its scale is alpha / rank.
    """

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
    save_steps: int = 50,
    resume: bool = True,
    seed: int = 0,
) -> None:
    """Train a value model and write it to OUTPUT.

    Parameters
    ----------
    rollouts
        Parquet file, or folder of shards, as `lenvm rollout` writes them.
    output
        Folder of the checkpoint.
    model
        Hub name or folder of the backbone to start from.
    base_model
        Name to write into the checkpoint, where it differs from MODEL.
    num_layers
        Layers of the backbone to keep, from the bottom; by default all.
    tune
        The full backbone, a LoRA adapter on it, or the head alone.
    gamma
        Discount; by default 1 - gamma^L99 = 0.99 with L99 from the finished completions.
    censored
        Completions cut by max_tokens: drop them, or use their length as a lower bound.
    holdout
        Share of the prompts kept for `lenvm evaluate`.
    learning_rate
        Of AdamW, at its highest; a cosine takes it to 0.
    epochs
        Passes over the data.
    max_steps
        Ends training early; -1 leaves it to the epochs.
    tokens_per_step
        Tokens of one optimizer step, in packs of max_length.
    max_length
        Tokens of a pack; a longer text loses its tail, its labels stay true.
    warmup_steps
        Steps in which the learning rate rises from 0.
    bf16
        Mixed precision; by default where the device has it natively.
    save_steps
        Steps between two saves to OUTPUT/steps, which goes when training is done.
    resume
        Go on from the last save of a run with the same settings.
    seed
        Of the head, the packs and their order.
    """
    _check_choice("tune", tune, WEIGHTS)
    _check_choice("censored", censored, get_args(Censored))
    _check(0 <= holdout < 1, "holdout", holdout, "at least 0 and below 1")
    _check(gamma is None or 0 < gamma < 1, "gamma", gamma, "between 0 and 1")
    _check(learning_rate > 0, "learning_rate", learning_rate, "above 0")
    _check(epochs > 0, "epochs", epochs, "above 0")
    _check(max_steps > 0 or max_steps == -1, "max_steps", max_steps, "above 0, or -1")
    _check(max_length > 1, "max_length", max_length, "above 1")
    _check(
        tokens_per_step >= max_length,
        "tokens_per_step",
        tokens_per_step,
        f"at least max_length {max_length}",
    )
    _check(warmup_steps >= 0, "warmup_steps", warmup_steps, "at least 0")
    _check(save_steps > 0, "save_steps", save_steps, "above 0")
    _check(lora.rank > 0, "lora.rank", lora.rank, "above 0")
    _check(lora.alpha > 0, "lora.alpha", lora.alpha, "above 0")
    _check(
        output.resolve() != Path(model).resolve(),
        "output",
        str(output),
        "another folder than the model's",
    )
    depth, vocab_size = load_shape(model)
    if num_layers is None:
        num_layers = depth
    _check(1 <= num_layers <= depth, "num_layers", num_layers, f"1 to {depth}, as {model} has")
    set_seed(seed)
    if bf16 is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        bf16 = default_dtype(device) == torch.bfloat16

    train_part, _ = split(read_rollouts(rollouts), holdout)
    if gamma is None:
        finished = [len(r.completion_ids) for r in train_part if r.finished]
        if not finished:
            raise ValueError(f"gamma: {rollouts} has no finished completion to take it from")
        gamma = gamma_from_length(float(np.percentile(finished, 99)))
    kept = [r for r in train_part if r.finished or censored == "bound"]
    examples = [e for e in (make_example(r, max_length) for r in kept) if e.has_labels]
    if not examples:
        raise ValueError(
            f"rollouts: {rollouts} has nothing to train on with holdout {holdout}, "
            f"max_length {max_length} and censored {censored!r}"
        )
    largest = max(int(e.input_ids.max()) for e in examples)
    _check(largest < vocab_size, "token id", largest, f"below {model}'s vocab_size {vocab_size}")
    dataset = PackedDataset(examples, max_length, seed)
    config = LenvmConfig(
        gamma=gamma,
        base_model=base_model or model,
        weights=WEIGHTS[tune],
        num_layers=num_layers,
        tokenizer_fingerprint=tokenizer_fingerprint(AutoTokenizer.from_pretrained(model)),
        training={
            "rollouts": rollouts.name,
            "completions": len(kept),
            "cut": sum(not r.finished for r in kept),
            "censored": censored,
            "learning_rate": learning_rate,
            "epochs": epochs,
            "max_steps": max_steps,
            "tokens_per_step": tokens_per_step,
            "max_length": max_length,
            "warmup_steps": warmup_steps,
            "bf16": bf16,
            "holdout": holdout,
            "seed": seed,
        },
    )
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
        save_steps=save_steps,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    settings = msgspec.to_builtins(config) | config.training | {"model": model}
    settings |= {"lora": asdict(lora), "data": digest(examples)}
    del settings["training"]
    with arguments.main_process_first():
        last = open_steps(steps, settings, resume)
    value_model = build_model(model, config, tune, lora, torch.bfloat16 if bf16 else torch.float32)
    trainer = ValueTrainer(
        value_model, arguments, train_dataset=dataset, data_collator=collate, gamma=gamma
    )
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.is_world_process_zero():
        value_model.save(output)
        shutil.rmtree(steps)


def _check(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"{field}: {value!r}, must be {rule}")


def _check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    _check(value in choices, field, value, "one of " + ", ".join(choices))


def load_shape(model: str) -> tuple[int, int]:
    """(layers, vocabulary size) of a backbone. Raises ValueError if there is none."""
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {model!r} does not load: {error}") from error
    return config.num_hidden_layers, config.vocab_size

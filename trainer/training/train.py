"""`lenvm train`: from rollouts to a checkpoint."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoConfig, AutoTokenizer, set_seed
from transformers.integrations import TensorBoardCallback

from trainer.checks import check, check_choice
from trainer.data import (
    Example,
    PackedDataset,
    Rollout,
    collate,
    digest,
    make_example,
    prompt_example,
    prompt_hashes,
    read_rollouts,
    split,
)
from trainer.evaluation.baselines import fit_baselines
from trainer.evaluation.card import write_card
from trainer.training.objective import PERCENTILE, Objective
from trainer.training.recipe import Recipe
from trainer.training.steps import last_step, open_steps
from trainer.training.value_trainer import ValueTrainer
from value_server.contract.checkpoint import (
    CheckpointError,
    LenvmConfig,
    read_config,
    tokenizer_fingerprint,
)
from value_server.contract.values import gamma_from_length
from value_server.model.value_model import ValueHead, ValueModel, load_backbone

Tune = Literal["full", "lora", "head"]
SKETCH_SIZE = 32
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
    objective: Objective = Objective(),
    recipe: Recipe = Recipe(),
    holdout: float = 0.05,
    resume: bool = True,
    tensorboard: Path | None = None,
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
    holdout
        Share of the prompts kept for `lenvm evaluate`.
    resume
        Go on from the last save of a run with the same settings; a finished one stays as it is.
    tensorboard
        Folder for TensorBoard's log.
    """
    check_choice("tune", tune, WEIGHTS)
    objective.check()
    recipe.check()
    check(0 <= holdout < 1, "holdout", holdout, "at least 0 and below 1")
    check(lora.rank > 0, "lora.rank", lora.rank, "above 0")
    check(lora.alpha > 0, "lora.alpha", lora.alpha, "above 0")
    apart = output.resolve() != Path(model).resolve()
    check(apart, "output", str(output), "another folder than the model's")
    depth, vocab_size = load_shape(model)
    if num_layers is None:
        num_layers = depth
    check(1 <= num_layers <= depth, "num_layers", num_layers, f"1 to {depth}, as {model} has")
    set_seed(recipe.seed)

    train_part, _ = split(read_rollouts(rollouts), holdout)
    gamma = choose_gamma(train_part, objective, rollouts)
    kept = [r for r in train_part if r.finished or objective.censored != "drop"]
    examples = [e for r in kept if (e := example_of(r, objective, recipe)).has_labels]
    if not examples:
        raise ValueError(
            f"rollouts: {rollouts} has nothing to train on with holdout {holdout}, "
            f"max_length {recipe.max_length} and censored {objective.censored!r}"
        )
    largest = max(int(e.input_ids.max()) for e in examples)
    check(largest < vocab_size, "token id", largest, f"below {model}'s vocab_size {vocab_size}")
    config = LenvmConfig(
        gamma=gamma,
        base_model=base_model or model,
        weights=WEIGHTS[tune],
        num_layers=num_layers,
        tokenizer_fingerprint=tokenizer_fingerprint(AutoTokenizer.from_pretrained(model)),
        target=objective.target,
        target_scale=choose_scale(examples, objective),
        training={
            "rollouts": rollouts.name,
            "completions": len(kept),
            "cut": sum(not r.finished for r in kept),
            "holdout": holdout,
            **objective.facts(),
            **recipe.facts(),
            "baselines": fit_baselines(train_part, gamma, recipe.max_length),
            "prompt_sketch": prompt_hashes(kept)[:SKETCH_SIZE],
        },
    )
    steps = output / "steps"
    arguments = recipe.arguments(steps)
    settings = msgspec.to_builtins(config) | config.training | {"model": model}
    settings |= {"lora": asdict(lora), "data": digest(examples)}
    del settings["training"]
    run = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    if resume and not steps.exists() and is_finished(output, run):
        print(f"{output}: finished before; without resume it starts anew")
        return
    first = arguments.process_index == 0
    with arguments.main_process_first():
        last = open_steps(steps, settings, resume) if first else last_step(steps)
    dtype = torch.bfloat16 if recipe.mixed else torch.float32
    value_model = build_model(model, config, tune, lora, dtype)
    if recipe.gradient_checkpointing:
        value_model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = ValueTrainer(
        value_model,
        arguments,
        train_dataset=PackedDataset(
            examples,
            recipe.max_length,
            recipe.seed,
            grouped=recipe.batches == "grouped",
            trajectory_mean=objective.weighting == "trajectory",
            prompt_weight=objective.prompt_weight,
        ),
        data_collator=collate,
        objective=objective,
        readout=config.readout,
        callbacks=[TensorBoardCallback(SummaryWriter(tensorboard))]
        if tensorboard and first
        else [],
    )
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    weights = trainer.accelerator.get_state_dict(trainer.model)  # all processes, if sharded
    if first:
        if trainer.is_fsdp_enabled:
            value_model = build_model(model, config, tune, lora, dtype)
            value_model.load_state_dict(weights)
        facts = config.training | {"loss_curve": loss_curve(trainer.state.log_history), "run": run}
        value_model.lenvm = msgspec.structs.replace(config, training=facts)
        value_model.save(output)
        write_card(output, value_model.lenvm)
        shutil.rmtree(steps)


def example_of(rollout: Rollout, objective: Objective, recipe: Recipe) -> Example:
    """What one completion teaches."""
    prompt_alone = objective.censored == "prompt" and not rollout.finished
    return (prompt_example if prompt_alone else make_example)(rollout, recipe.max_length)


def is_finished(output: Path, run: str) -> bool:
    """Whether `output` holds the checkpoint of a run with the same settings."""
    try:
        return read_config(output).training.get("run") == run
    except CheckpointError:
        return False


def loss_curve(history: Sequence[dict[str, float]]) -> list[float]:
    """Mean training loss of each tenth of the steps."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return [float(np.mean(part)) for part in np.array_split(losses, 10) if len(part)]


def choose_gamma(rollouts: Sequence[Rollout], objective: Objective, source: Path) -> float:
    """As given, or from the finished lengths. Raises ValueError if there are none."""
    if objective.gamma is not None:
        return objective.gamma
    finished = [len(r.completion_ids) for r in rollouts if r.finished]
    if not finished:
        raise ValueError(f"gamma: {source} has no finished completion to take it from")
    percentile = objective.gamma_percentile or PERCENTILE
    return gamma_from_length(float(np.percentile(finished, percentile)))


def choose_scale(examples: Sequence[Example], objective: Objective) -> float:
    """As given; else the longest label where the output is a share of it, and one token."""
    if objective.target_scale is not None:
        return objective.target_scale
    if objective.target == "normalised_length":
        return max(float(e.labels.max()) for e in examples)
    return 1.0


def load_shape(model: str) -> tuple[int, int]:
    """(layers, vocabulary size) of a backbone. Raises ValueError if there is none."""
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {model!r} does not load: {error}") from error
    return config.num_hidden_layers, config.vocab_size

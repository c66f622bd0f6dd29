"""`lenvm train`: from rollouts to a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations

from trainer.checks import check
from trainer.data import Example, PackedDataset
from trainer.digests import digest
from trainer.evaluation.card import write_card
from trainer.resume import ANEW, ELSEWHERE, as_before, check_same, fingerprint
from trainer.seen import SeenPacks, collate_seen
from trainer.training.backbone import Backbone, check_causal
from trainer.training.examples import Examples, read_examples
from trainer.training.steps import FOUND, clear, last_step, open_steps
from trainer.training.training import Training
from trainer.training.value_trainer import ValueTrainer, held_out_loss
from value_server.contract.checkpoint import (
    CONFIG_FILE,
    CheckpointError,
    LenvmConfig,
    read_config,
)
from value_server.model.value_model import ValueModel

# What follows from the data, if nobody chose it: told after what was chosen. The last are no help.
OF_DATA = ("completions", "cut", "data", "gamma", "target_scale", "prompt_sketch", "baselines")
UNTOLD = OF_DATA[-2:]


def train(
    rollouts: Path,
    output: Path,
    *,
    training: Training,
    resume: bool = True,
    tensorboard: Path | None = None,
    report_to: tuple[str, ...] = (),
) -> None:
    """Train a value model and write it to OUTPUT.

    Parameters
    ----------
    rollouts
        Parquet file, or folder of shards, as `lenvm rollout` writes them. Several of them as
        a.parquet=2,b/=1: a token of the first then counts twice as much as one of the second.
    output
        Folder of the checkpoint.
    resume
        Go on from the last save of a run with the same settings and data; a finished one stays as
        it is.
    tensorboard
        Folder for TensorBoard's log.
    report_to
        Trackers that are installed and log as well, by transformers' names: wandb, mlflow, trackio.
    """
    apart = output.resolve() != Path(training.backbone.model).resolve()
    check(apart, "output", str(output), "another folder than the model's")
    check_trackers(report_to)
    training.check()
    set_seed(training.recipe.seed)
    examples, config = read_examples(rollouts, training)
    steps = output / "steps"
    arguments = training.recipe.arguments(steps, report_to)
    settings = settings_of(examples, config, training.backbone)
    if resume and last_step(steps) is None and is_finished(output, settings):
        clear(steps)  # what is left where it was killed at its very end
        print(f"{output}: finished before; {ANEW} starts anew")
        return
    first = arguments.process_index == 0
    if first and (told := training.recipe.told()):
        print(told)
    with arguments.main_process_first():
        last = open_steps(steps, settings, resume) if first else last_step(steps)
    loop = training_loop(examples, config, training, arguments, tensorboard if first else None)
    loop.train(resume_from_checkpoint=str(last) if last else None)
    weights = loop.accelerator.get_state_dict(loop.model)  # all processes, if sharded
    if first:
        model = loop.model
        if loop.is_fsdp_enabled:
            model = training.fresh_model(config)
            model.load_state_dict(weights)
        write_checkpoint(output, model, {**found_out(loop), "run": fingerprint(settings)})
        clear(steps)


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError naming one that is not installed, or that transformers does not know."""
    known = get_available_reporting_integrations()
    for name in names:
        check(name in known, "report_to", name, f"one that is installed: {', '.join(known)}")


def settings_of(examples: Examples, config: LenvmConfig, backbone: Backbone) -> dict[str, Any]:
    """All that shapes the weights, as JSON: what was chosen, then what follows from the data."""
    facts = msgspec.to_builtins(config) | config.training
    del facts["training"], facts["base_fingerprint"]  # so that runs of before it was known go on
    if not config.lookahead_rank:  # so that runs of before there was any go on
        del facts["lookahead_rank"]
    if not config.pictures:  # the same
        del facts["pictures"]
    lora = asdict(backbone.lora)
    start = backbone.start and str(backbone.start)
    own = {
        "model": backbone.model,
        "lora": lora,
        "data": digest([*examples.learnt, *examples.judged]),
    }
    settings = facts | own | ({"start": start} if start else {})
    chosen = {name: value for name, value in settings.items() if name not in OF_DATA}
    return chosen | {name: settings[name] for name in OF_DATA}


def training_loop(
    examples: Examples,
    config: LenvmConfig,
    training: Training,
    arguments: TrainingArguments,
    tensorboard: Path | None,
) -> ValueTrainer:
    """A fresh model, and all that its training takes."""
    recipe = training.recipe
    model = training.fresh_model(config)
    if training.backbone.attention == "sdpa":  # the others do not take float32, or compile first
        check_causal(model, training.backbone.model)
    if recipe.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    dataset = packed(examples.learnt, training)
    callbacks: list[TrainerCallback] = []
    if recipe.patience is not None:
        callbacks.append(EarlyStoppingCallback(recipe.patience))
    if tensorboard:
        callbacks.append(TensorBoardCallback(SummaryWriter(tensorboard)))
    return ValueTrainer(
        model,
        arguments,
        train_dataset=shown(dataset, model),
        eval_dataset=shown(packed(examples.judged, training), model) if examples.judged else None,
        compute_metrics=held_out_loss,
        data_collator=collate_seen,
        objective=training.objective,
        readout=config.readout,
        ahead=training.ahead,
        per_scored=dataset.per_scored,
        callbacks=callbacks,
    )


def packed(examples: Sequence[Example], training: Training) -> PackedDataset:
    """As the recipe says."""
    objective, recipe = training.objective, training.recipe
    return PackedDataset(
        examples,
        recipe.max_length,
        recipe.seed,
        grouped=recipe.batches == "grouped",
        trajectory_mean=objective.weighting == "trajectory",
        prompt_weight=objective.prompt_weight,
        packing=recipe.packing,
    )


def shown(packs: PackedDataset, model: ValueModel) -> PackedDataset | SeenPacks:
    """With their pictures, for a model that sees them."""
    return packs if model.sight is None else SeenPacks(packs, model.sight)


def is_finished(output: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `output` holds the checkpoint of a run with the same settings.

    Raises ValueError, naming a setting that differs if one is known, where it holds another.
    """
    if not (output / CONFIG_FILE).exists():
        return False
    anew = f"{ELSEWHERE}, or {ANEW},"
    try:
        found = read_config(output)
    except CheckpointError as error:
        raise ValueError(f"output: {error}; {anew} starts anew") from error
    before = msgspec.to_builtins(found) | found.training
    settings = as_before(before, settings, FOUND)
    if before.get("run") == fingerprint(settings):
        return True
    known = [name for name in settings if name in before and name not in UNTOLD]
    check_same(output, {n: before[n] for n in known}, {n: settings[n] for n in known}, anew)
    raise ValueError(
        f"output: {output} holds a value model of other data, model or options; {anew} starts anew"
    )


def found_out(loop: ValueTrainer) -> dict[str, Any]:
    """loss_curve: mean training loss of each tenth of the steps. Where held-out prompts were looked
    at, also the step whose weights these are, and the loss there."""
    losses = [entry["loss"] for entry in loop.state.log_history if "loss" in entry]
    curve = [float(np.mean(part)) for part in np.array_split(losses, 10) if len(part)]
    if loop.state.best_metric is None:
        return {"loss_curve": curve}
    best = {"best_step": loop.state.best_global_step, "held_out_loss": loop.state.best_metric}
    return {"loss_curve": curve, **best}


def write_checkpoint(output: Path, model: ValueModel, facts: Mapping[str, Any]) -> None:
    """With what the run found out, beside what it was made with."""
    training = {**model.lenvm.training, **facts}
    model.lenvm = msgspec.structs.replace(model.lenvm, training=training)
    model.save(output)
    write_card(output, model.lenvm)

"""`lenvm train`: from rollouts to a checkpoint."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from cyclopts import Parameter
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from trainer.candidates import count, read_candidates
from trainer.checks import check
from trainer.data import (
    Example,
    PackedDataset,
    Rollout,
    collate,
    digest,
    finished_lengths,
    make_example,
    prompt_example,
    prompt_hashes,
    split,
)
from trainer.evaluation.baselines import fit_baselines
from trainer.evaluation.card import write_card
from trainer.resume import check_same, fingerprint
from trainer.rollout_files import read_rollouts
from trainer.training.ahead import Ahead
from trainer.training.backbone import Backbone, load_shape
from trainer.training.objective import Objective
from trainer.training.recipe import Recipe
from trainer.training.steps import last_step, open_steps
from trainer.training.value_trainer import ValueTrainer
from value_server.contract.checkpoint import (
    CONFIG_FILE,
    CheckpointError,
    LenvmConfig,
    read_config,
)
from value_server.contract.weights import weights_fingerprint
from value_server.model.value_model import ValueModel

SKETCH_SIZE = 32
OF_DATA = ("completions", "cut", "baselines", "prompt_sketch")  # facts that nobody chose


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Training:
    """All that shapes a value model beside its rollouts."""

    backbone: Backbone
    objective: Objective = Objective()
    ahead: Ahead = Ahead()
    recipe: Recipe = Recipe()
    holdout: float = 0.05
    """Share of the prompts kept for `lenvm evaluate`."""

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        self.objective.check()
        self.ahead.check(self.objective)
        self.recipe.check()
        check(0 <= self.holdout < 1, "holdout", self.holdout, "at least 0 and below 1")
        self.backbone.check()
        if self.recipe.packing and (kind := self.backbone.states()):
            rule = f"left out (--no-packing) with {kind} layers, which carry states between texts"
            check(False, "packing", True, rule)
        if start := self.backbone.started():
            where = f"as {self.backbone.start} has"
            gamma, target = self.objective.gamma, self.objective.target
            check(gamma in (None, start.gamma), "gamma", gamma, f"{start.gamma}, {where}")
            check(target == start.target, "target", target, f"{start.target}, {where}")

    def facts(self) -> dict[str, Any]:
        """What was chosen, for the checkpoint, which has the backbone in its own place."""
        parts = (self.objective, self.ahead, self.recipe)
        facts = {name: value for part in parts for name, value in part.facts().items()}
        return {"holdout": self.holdout, **facts}

    def discount(self, part: Sequence[Rollout]) -> float:
        """gamma: of the checkpoint to go on from, or the objective's for these rollouts."""
        start = self.backbone.started()
        return start.gamma if start else self.objective.discount(finished_lengths(part))

    def part(self, rollouts: Path) -> list[Rollout]:
        """The rollouts that are not held out."""
        return split(read_rollouts(rollouts, self.backbone.tokenizer()), self.holdout)[0]

    def fresh_model(self, config: LenvmConfig) -> ValueModel:
        """Before any step."""
        dtype = torch.bfloat16 if self.recipe.mixed else torch.float32
        return self.backbone.build(config, dtype)


def train(
    rollouts: Path,
    output: Path,
    *,
    training: Training,
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
    resume
        Go on from the last save of a run with the same settings; a finished one stays as it is.
    tensorboard
        Folder for TensorBoard's log.
    """
    apart = output.resolve() != Path(training.backbone.model).resolve()
    check(apart, "output", str(output), "another folder than the model's")
    training.check()
    set_seed(training.recipe.seed)
    examples, config = read_examples(rollouts, training)
    steps = output / "steps"
    arguments = training.recipe.arguments(steps)
    settings = settings_of(examples, config, training.backbone)
    run = fingerprint(settings)
    if resume and not steps.exists() and is_finished(output, run, settings):
        print(f"{output}: finished before; without resume it starts anew")
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
        write_checkpoint(output, model, {"loss_curve": loss_curve(loop), "run": run})
        shutil.rmtree(steps)


def read_examples(rollouts: Path, training: Training) -> tuple[list[Example], LenvmConfig]:
    """What is learnt, and what the checkpoint will say of itself.

    Raises ValueError where nothing can be learnt from the rollouts.
    """
    objective, recipe, backbone = training.objective, training.recipe, training.backbone
    part = training.part(rollouts)
    gamma = training.discount(part)
    kept = [r for r in part if r.finished or objective.censored != "drop"]
    examples = [e for r in kept if (e := example_of(r, objective, recipe)).has_labels]
    if not examples:
        raise ValueError(
            f"rollouts: {rollouts} has nothing to train on with holdout {training.holdout}, "
            f"max_length {recipe.max_length} and censored {objective.censored!r}"
        )
    examples = with_candidates(examples, training.ahead, gamma)
    _, vocab_size = load_shape(backbone.model)
    largest = max(int(e.input_ids.max()) for e in examples)
    known = f"below {backbone.model}'s vocab_size {vocab_size}"
    check(largest < vocab_size, "token id", largest, known)
    config = LenvmConfig(
        gamma=gamma,
        base_model=backbone.name(),
        weights=backbone.weights(),
        num_layers=backbone.depth(),
        tokenizer_fingerprint=backbone.tokenizer().fingerprint,
        base_fingerprint=weights_fingerprint(backbone.model),
        target=objective.target,
        target_scale=objective.scale(max(float(e.labels.max()) for e in examples)),
        lookahead_rank=training.ahead.lookahead,
        training={
            "rollouts": rollouts.name,
            "completions": len(kept),
            "cut": sum(not r.finished for r in kept),
            **training.facts(),
            "baselines": fit_baselines(part, gamma, recipe.max_length),
            "prompt_sketch": prompt_hashes(kept)[:SKETCH_SIZE],
        },
    )
    return examples, config


def example_of(rollout: Rollout, objective: Objective, recipe: Recipe) -> Example:
    """What one completion teaches."""
    prompt_alone = objective.censored == "prompt" and not rollout.finished
    return (prompt_example if prompt_alone else make_example)(rollout, recipe.max_length)


def with_candidates(examples: Sequence[Example], ahead: Ahead, gamma: float) -> list[Example]:
    """Each with those of its text, logits in `gamma`. Raises ValueError where none has any."""
    if ahead.candidates is None:
        return list(examples)
    found = read_candidates(ahead.candidates, gamma)
    joined = []
    for e in examples:
        own = found.get(e.text_key)
        joined.append(replace(e, candidates=own and own.within(len(e.input_ids))))
    there = count([e.candidates for e in joined]) > 0
    check(there, "candidates", str(ahead.candidates), "of these rollouts, no text is among them")
    return joined


def settings_of(
    examples: Sequence[Example], config: LenvmConfig, backbone: Backbone
) -> dict[str, Any]:
    """All that shapes the weights, as JSON."""
    facts = msgspec.to_builtins(config) | config.training
    del facts["training"], facts["base_fingerprint"]  # so that runs of before it was known go on
    if not config.lookahead_rank:  # so that runs of before there was any go on
        del facts["lookahead_rank"]
    lora = asdict(backbone.lora)
    start = backbone.start and str(backbone.start)
    own = {"model": backbone.model, "lora": lora, "data": digest(examples)}
    return facts | own | ({"start": start} if start else {})


def training_loop(
    examples: Sequence[Example],
    config: LenvmConfig,
    training: Training,
    arguments: TrainingArguments,
    tensorboard: Path | None,
) -> ValueTrainer:
    """A fresh model, and all that its training takes."""
    objective, recipe = training.objective, training.recipe
    model = training.fresh_model(config)
    if recipe.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    dataset = PackedDataset(
        examples,
        recipe.max_length,
        recipe.seed,
        grouped=recipe.batches == "grouped",
        trajectory_mean=objective.weighting == "trajectory",
        prompt_weight=objective.prompt_weight,
        packing=recipe.packing,
    )
    return ValueTrainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=collate,
        objective=objective,
        readout=config.readout,
        ahead=training.ahead,
        per_scored=dataset.per_scored,
        callbacks=[TensorBoardCallback(SummaryWriter(tensorboard))] if tensorboard else [],
    )


def is_finished(output: Path, run: str, settings: Mapping[str, Any]) -> bool:
    """Whether `output` holds the checkpoint of a run with the same settings.

    Raises ValueError, naming a setting that differs if one is known, where it holds another.
    """
    if not (output / CONFIG_FILE).exists():
        return False
    anew = "another output folder, or --no-resume,"
    try:
        found = read_config(output)
    except CheckpointError as error:
        raise ValueError(f"output: {error}; {anew} starts anew") from error
    if found.training.get("run") == run:
        return True
    before = msgspec.to_builtins(found) | found.training
    known = [name for name in settings if name in before and name not in OF_DATA]
    check_same(output, {n: before[n] for n in known}, {n: settings[n] for n in known}, anew)
    raise ValueError(
        f"output: {output} holds a value model of other data, model or options; {anew} starts anew"
    )


def loss_curve(loop: ValueTrainer) -> list[float]:
    """Mean training loss of each tenth of the steps."""
    losses = [entry["loss"] for entry in loop.state.log_history if "loss" in entry]
    return [float(np.mean(part)) for part in np.array_split(losses, 10) if len(part)]


def write_checkpoint(output: Path, model: ValueModel, facts: Mapping[str, Any]) -> None:
    """With what the run found out, beside what it was made with."""
    training = {**model.lenvm.training, **facts}
    model.lenvm = msgspec.structs.replace(model.lenvm, training=training)
    model.save(output)
    write_card(output, model.lenvm)

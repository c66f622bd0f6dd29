"""What is learnt from rollouts, and what the checkpoint will say of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from trainer.candidates import count, read_candidates
from trainer.checks import check
from trainer.data import Example, Rollout, make_example, prompt_example
from trainer.digests import prompt_hashes
from trainer.evaluation.baselines import fit_baselines
from trainer.pictures import check_pictures
from trainer.rollout_files import name_of
from trainer.training.ahead import Ahead
from trainer.training.backbone import load_shape
from trainer.training.objective import Objective
from trainer.training.recipe import Recipe
from trainer.training.training import Training
from value_server.contract.checkpoint import LenvmConfig
from value_server.contract.weights import weights_fingerprint

SKETCH_SIZE = 32


class Examples(NamedTuple):
    """learnt: to train on. judged: of held-out prompts, none where training does not look."""

    learnt: list[Example]
    judged: list[Example]


def read_examples(rollouts: Path, training: Training) -> tuple[Examples, LenvmConfig]:
    """The examples, and the checkpoint's config before training.

    Raises ValueError where nothing can be learnt from the rollouts.
    """
    objective, recipe, backbone = training.objective, training.recipe, training.backbone
    part, held_out = training.parts(rollouts)
    sees = backbone.sees(any(r.pictures for r in [*part, *held_out]))
    gamma = training.discount(part)
    kept = kept_of(part, objective)
    examples = examples_of(kept, training)
    if not examples:
        raise ValueError(
            f"rollouts: {rollouts} has nothing to train on with holdout {training.holdout}, "
            f"max_length {recipe.max_length} and censored {objective.censored!r}"
        )
    judged = examples_of(kept_of(held_out, objective), training) if recipe.eval_steps else []
    enough = bool(judged) or recipe.eval_steps is None
    check(enough, "holdout", training.holdout, f"larger: nothing of {rollouts} is held out")
    if sees:
        check_pictures([e.rollout for e in [*examples, *judged]])
    examples = with_candidates(examples, training.ahead, gamma)
    _, vocab_size = load_shape(backbone.model)
    largest = max(int(e.input_ids.max()) for e in [*examples, *judged])
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
        pictures=sees,
        training={
            "rollouts": name_of(rollouts),
            "completions": len(kept),
            "cut": sum(not r.finished for r in kept),
            **training.facts(),
            "baselines": fit_baselines(part, gamma, recipe.max_length),
            "prompt_sketch": prompt_hashes(kept)[:SKETCH_SIZE],
        },
    )
    return Examples(examples, judged), config


def kept_of(rollouts: Sequence[Rollout], objective: Objective) -> list[Rollout]:
    """Those that teach something."""
    return [r for r in rollouts if r.finished or objective.censored != "drop"]


def examples_of(rollouts: Sequence[Rollout], training: Training) -> list[Example]:
    """What each teaches, where its prompt leaves room for anything."""
    found = (example_of(r, training.objective, training.recipe) for r in rollouts)
    return [example for example in found if example.has_labels]


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
        joined.append(replace(e, candidates=own and own.within(e.length)))
    there = count([e.candidates for e in joined]) > 0
    check(there, "candidates", str(ahead.candidates), "of these rollouts, no text is among them")
    return joined

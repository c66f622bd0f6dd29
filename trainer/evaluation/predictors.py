"""A checkpoint beside others and beside guesses without one, on the same completions."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.checks import check
from trainer.data import THINKING_END, Rollout, ending_at, split
from trainer.digests import prompt_hashes
from trainer.evaluation.baselines import baseline_logits, fit_baselines
from trainer.evaluation.figures import Predicted, predicted
from trainer.evaluation.journal import close_journal, open_journal
from trainer.evaluation.lexical import fit_lexical
from trainer.evaluation.predict import predict_all
from trainer.reading import Reading
from trainer.rollout_files import read_rollouts
from value_server.contract.checkpoint import LenvmConfig
from value_server.contract.values import length_from_logit, logit_from_length

LEXICAL = "words of the prompt"


@contextmanager
def predictors(
    checkpoints: Sequence[Path],
    rollouts: Path,
    reading: Reading,
    gamma: float,
    *,
    training: Path | None = None,
    holdout: float | None = None,
) -> Iterator[dict[str, list[Predicted]]]:
    """By name what each predicts, of completions that the first checkpoint did not see.

    gamma: that all are compared under. training, holdout: see `evaluate`. The guess by words needs
    the training's rollouts and the texts of all prompts. Predictions are kept until the block has
    ended without an error. Raises ValueError naming what is wrong.
    """
    paths = {path.name: path for path in checkpoints}
    names = [*map(str, checkpoints)]
    check(len(paths) == len(names), "checkpoint", names, "of different names")
    models = {name: reading.load(path) for name, path in paths.items()}
    config, longest = models[checkpoints[0].name].lenvm, reading.max_length
    for name, model in models.items():
        same = model.lenvm.tokenizer_fingerprint == config.tokenizer_fingerprint
        check(same, "compare", str(paths[name]), f"one with the tokenizer of {checkpoints[0]}")
    end = config.training.get(THINKING_END)
    known, held_out = split_as_trained(read_rollouts(rollouts), config, holdout)
    if not any(r.finished and len(r.prompt_ids) <= longest for r in held_out):
        raise ValueError(
            f"holdout: {rollouts} has no finished completion to evaluate: {len(held_out)} of "
            f"{len(known) + len(held_out)} are held out, with {sum(r.finished for r in held_out)} "
            f"finished, and max_length is {longest}; --holdout 1 takes all"
        )
    if training:
        known = ending_at(read_rollouts(training), end)
    journals = {n: open_journal(paths[n], models[n], held_out, longest) for n in models}
    logits: dict[str, Iterable[NDArray[Any]]] = {}
    for name, model in models.items():
        own = predict_all(model, held_out, reading, name, journals[name])
        logits[name] = [with_gamma(z, model.lenvm.gamma, gamma) for z in own]
    fitted = None if training else config.training.get("baselines")
    fitted = fitted or fit_baselines(known, config.gamma, longest)  # nothing of cut ones alone
    fitted = fitted or fit_baselines(held_out, config.gamma, longest)
    for name, line in fitted.items():
        guesses = (baseline_logits(line, rollout, longest) for rollout in held_out)
        logits[name] = [with_gamma(z, config.gamma, gamma) for z in guesses]
    if (words := fit_lexical(known, gamma, longest)) and all(r.prompt for r in held_out):
        logits[LEXICAL] = [words.logits(rollout, longest) for rollout in held_out]
    yield {name: predicted(held_out, own, gamma, longest) for name, own in logits.items()}
    for journal in journals.values():
        close_journal(journal)


def split_as_trained(
    rollouts: Sequence[Rollout], config: LenvmConfig, holdout: float | None
) -> tuple[list[Rollout], list[Rollout]]:
    """(seen in training, not seen), as the checkpoint's facts tell, or by `holdout`; each as far
    as training reads it."""
    facts = config.training
    rollouts = ending_at(rollouts, facts.get(THINKING_END))
    if holdout is None:
        sketch = facts.get("prompt_sketch")
        others = sketch is not None and not set(sketch) & set(prompt_hashes(rollouts))
        holdout = 1.0 if others else facts.get("holdout", 1.0)
    return split(rollouts, holdout)


def with_gamma(z: NDArray[Any], before: float, after: float) -> NDArray[np.float64]:
    """The logits of the same lengths under another gamma."""
    if before == after:
        return z
    length = length_from_logit(torch.from_numpy(z).double(), before)
    converted: NDArray[np.float64] = logit_from_length(length, after).numpy()
    return converted

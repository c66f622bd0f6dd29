"""A guess from the words of a prompt: gradient-boosted trees on its length, digits, verbs and
question words. It is what a value model has to beat before it can claim to understand prompts.

Legend: P prompt tokens, R completion tokens, F features, K labelled positions (see data).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data import Rollout, known_values
from trainer.evaluation.baselines import logits_of_guess
from trainer.evaluation.boosting import Boosted, boost

Floats = NDArray[np.float64]
STRIDE = 100  # the fit within texts sees one token in so many: each counts the same, as in R²
# What is asked: question words, verbs, and names of what is to be written.
WORDS = (
    *("what", "why", "how", "who", "when", "where", "which", "can", "is", "are", "do", "if"),
    *("write", "explain", "describe", "list", "give", "name", "create", "generate", "design"),
    *("find", "calculate", "compute", "solve", "evaluate", "determine", "prove", "simplify"),
    *("summarize", "classify", "translate", "rewrite", "compare", "convert", "sort", "suggest"),
    *("function", "program", "code", "python", "class", "story", "essay", "poem", "letter"),
    *("email", "steps", "example", "examples", "sentence", "paragraph", "word", "words"),
    *("tokens", "short", "brief", "briefly", "detailed", "long", "most", "least", "equal"),
)
_WORD, _NUMBER = re.compile(r"[a-z']+"), re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Lexical:
    """boundary: u at the prompt's end, of `features`; tokens: within, of these and log written."""

    boundary: Boosted
    tokens: Boosted

    def logits(self, rollout: Rollout, max_length: int) -> Floats:
        """(T,) over prompt and completion; those before the prompt's end mean nothing."""
        prompt = len(rollout.prompt_ids)
        size = min(prompt + len(rollout.completion_ids), max_length)
        own = features(rollout.prompt, prompt)
        u = self.tokens(_within(own, np.arange(max(size - prompt + 1, 0))))
        u[:1] = self.boundary(own[None])
        return logits_of_guess(u, size)


def features(text: str, tokens: int) -> Floats:
    """(F,) of a prompt of so many tokens."""
    lower = text.lower()
    words = _WORD.findall(lower)
    numbers = [float(number[:9]) for number in _NUMBER.findall(text)]
    counts = (
        *(tokens, len(text), len(words), text.count("\n"), text.count("?"), text.count(",")),
        *(sum(map(str.isdigit, text)), len(numbers), max(numbers, default=0.0)),
        *((numbers or [0.0])[-1], sum(map(len, words)) / max(len(words), 1)),
    )
    there = set(words)
    return np.array([*np.log1p(counts), *(word in there for word in WORDS)], dtype=np.float64)


def fit_lexical(rollouts: Sequence[Rollout], gamma: float, max_length: int) -> Lexical | None:
    """Fit to u of these completions; None where none has both a text and an end.

    A cut completion counts at its bound at the boundary, and not within.
    """
    chance = np.random.default_rng(0)
    boundary: list[tuple[Floats, float]] = []
    within: list[tuple[Floats, Floats]] = []
    for rollout in rollouts:
        u = known_values(rollout, gamma, max_length)
        if not len(u) or not rollout.prompt:
            continue
        own = features(rollout.prompt, len(rollout.prompt_ids))
        boundary.append((own, u[0]))
        if rollout.finished:
            places = np.arange(chance.integers(STRIDE), len(u), STRIDE)
            within.append((_within(own, places), u[places]))
    if not sum(len(own) for _, own in within):
        return None
    x, first = zip(*boundary, strict=True)
    x_within, u_within = zip(*within, strict=True)
    return Lexical(
        boost(np.stack(x), np.array(first)),
        boost(np.concatenate(x_within), np.concatenate(u_within)),
    )


def _within(own: Floats, written: NDArray[np.int64]) -> Floats:
    """(K, F + 1): the features of the prompt, and the log of the tokens written."""
    return np.column_stack([np.tile(own, (len(written), 1)), np.log1p(written)])

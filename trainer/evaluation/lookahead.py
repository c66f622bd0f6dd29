"""How well a lookahead head agrees with exact values.

Legend: N positions, K candidates of each; s their shares, the served model's probabilities among
them; u exact values, û the head's. m, m̂: means over s; c = u - m, ĉ = û - m̂.

r2_within    1 - sum of s·(c - ĉ)² / sum of s·c²; r2_within_even: all candidates alike
r2_mean      1 - sum of (m - m̂)² / sum of (m - the mean of m)²
correlation  median over positions of that of u and û, all candidates alike
effect       how far the tilts s·exp(±βû) move the mean of u, each β such that the tilted
             candidates are NATS from s, over how far the tilts by u itself move it
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cyclopts import Parameter
from numpy.typing import NDArray

from trainer.candidates import Candidates
from trainer.checks import check
from trainer.data import Rollout, make_example
from trainer.evaluation.predictors import with_gamma
from trainer.lookahead.distil import Scoring, chosen_positions, score
from trainer.lookahead.exact import check_branches
from trainer.reading import Reading
from value_server.contract.checkpoint import LenvmConfig
from value_server.model.value_model import ValueModel

Floats = NDArray[np.float64]
NATS = 0.2
BISECTIONS = 60
LARGEST_LOG_TILT = 16.0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Where a lookahead head is compared with exact values."""

    lookahead_positions: int = 0
    """Positions, about, at which a lookahead head is compared; needs the served model."""
    teacher: Path | None = None
    """Value model whose exact values count; by default the checkpoint itself."""
    scoring: Scoring = Scoring()

    def check(self, config: LenvmConfig) -> None:
        """Raises ValueError naming the option that is wrong for a checkpoint."""
        number = self.lookahead_positions
        check(number >= 0, "lookahead_positions", number, "at least 0")
        asked = number == 0 or config.lookahead_rank > 0
        check(asked, "lookahead_positions", number, "0 for a checkpoint without a lookahead head")
        self.scoring.check()


def agreement(
    model: ValueModel, rollouts: Sequence[Rollout], asked: Agreement, reading: Reading
) -> dict[str, float]:
    """On finished rollouts. Raises ValueError where not two positions are among them."""
    number, longest = asked.lookahead_positions, reading.max_length
    teacher = reading.load(asked.teacher) if asked.teacher else model
    check_branches(teacher)
    same = teacher.lenvm.tokenizer_fingerprint == model.lenvm.tokenizer_fingerprint
    check(same, "teacher", str(asked.teacher), "one with the tokenizer of the checkpoint")
    pictured = any(r.pictures for r in rollouts)
    check(not pictured, "lookahead_positions", number, "0 for rollouts with pictures")
    texts = [r for r in rollouts if r.finished and len(r.prompt_ids) <= longest]
    share = number / max(sum(len(r.completion_ids) for r in texts), 1)
    places = [chosen_positions(r, share, asked.scoring.seed, longest) for r in texts]
    served = asked.scoring.served(model, reading)
    found = score(teacher, served, texts, places, asked.scoring, longest)
    guesses = [told(model, *own, longest) for own in zip(texts, found, strict=True)]
    shares, z = (
        np.concatenate([getattr(own, name) for own in found]).astype(np.float64)
        for name in ("shares", "z")
    )
    z = with_gamma(z, teacher.lenvm.gamma, model.lenvm.gamma)
    return compare(shares, _sigmoid(z), _sigmoid(np.concatenate(guesses).astype(np.float64)))


@torch.inference_mode()
def told(
    model: ValueModel, rollout: Rollout, candidates: Candidates, max_length: int
) -> NDArray[np.float32]:
    """(N, K) logits that the lookahead head tells."""
    device = next(model.parameters()).device
    text = torch.from_numpy(make_example(rollout, max_length).input_ids).to(device)
    rows = model.hidden(text[None])[0][torch.from_numpy(candidates.positions).to(device)]
    z: NDArray[np.float32] = (
        model.following(rows, torch.from_numpy(candidates.ids).to(device)).cpu().numpy()
    )
    return z


def compare(shares: Floats, u: Floats, guess: Floats) -> dict[str, float]:
    """The figures; all (N, K). Raises ValueError where positions are too few for a variance."""
    check(len(u) > 1, "lookahead_positions", len(u), "more: so few were chosen")
    mean, guessed = (shares * u).sum(-1), (shares * guess).sum(-1)
    c, other = u - mean[:, None], guess - guessed[:, None]
    moved = [_moved(shares, values, u) for values in (guess, u)]
    return {
        "positions": len(u),
        "r2_within": _explained(shares * (c - other) ** 2, shares * c**2),
        "r2_within_even": _explained(_centred(u - guess) ** 2, _centred(u) ** 2),
        "r2_mean": _explained((mean - guessed) ** 2, _centred(mean) ** 2),
        "correlation": _median_correlation(u, guess),
        "effect": moved[0] / moved[1],
        "exact_moves": moved[1],
    }


def tilted(shares: Floats, values: Floats, nats: float, sign: int) -> Floats:
    """(N, K) shares · exp(sign·β·values), `nats` from the shares or as near as a tilt comes."""
    span = np.maximum(np.ptp(values, axis=-1, keepdims=True), 1e-12)
    steps = sign * (values - values.max(-1, keepdims=True)) / span
    log_s = np.log(np.maximum(shares, 1e-300))
    low, high = np.full((len(shares), 1), -LARGEST_LOG_TILT), np.full((len(shares), 1), 10.0)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        far = _divergence(_tilt(log_s, steps, middle), log_s) > nats
        low, high = np.where(far, low, middle), np.where(far, middle, high)
    return _tilt(log_s, steps, low)


def _tilt(log_s: Floats, steps: Floats, log_beta: Floats) -> Floats:
    logits = log_s + np.exp(log_beta) * steps
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    q: Floats = weights / weights.sum(-1, keepdims=True)
    return q


def _divergence(q: Floats, log_s: Floats) -> Floats:
    terms = q * (np.log(np.maximum(q, 1e-300)) - log_s)
    return terms.sum(-1, keepdims=True)


def _moved(shares: Floats, values: Floats, u: Floats) -> float:
    """Mean, over positions and both directions, of how far a tilt by `values` moves that of u."""
    ends = [sign * ((tilted(shares, values, NATS, sign) - shares) * u).sum(-1) for sign in (1, -1)]
    return float(np.mean(ends))


def _median_correlation(u: Floats, guess: Floats) -> float:
    a, b = _centred(u), _centred(guess)
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    varies = scale > 0
    return float(np.median((a * b).sum(-1)[varies] / scale[varies]))


def _centred(values: Floats) -> Floats:
    """Less the mean of the last axis."""
    centred: Floats = values - values.mean(-1, keepdims=True)
    return centred


def _explained(error: Floats, spread: Floats) -> float:
    return float(1 - error.sum() / spread.sum())


def _sigmoid(z: Floats) -> Floats:
    u: Floats = 1 / (1 + np.exp(-z))
    return u

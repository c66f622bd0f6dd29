"""Steering maths: from the model's distribution and values to the steered distribution.

Legend: B guided rows, K candidates that do not end the text (padded), all tensors float64 on
the CPU. q: the model's distribution over those K, p0: its probability of end-of-sequence, so
p(x) = (1 - p0) q(x). u = 1 - gamma^r as in value_server.contract.values; u(end) = 0 is known.
u* = 1 - gamma^r*, the value that meets the target; each mode keeps the mean value in an interval,
[u*, u*] for equal_to, [0, u*] for at_most, [u*, 1] for at_least.

End-of-sequence is no token like the others: its probability *is* the length decision. So
`project` works in two parts. First q is tilted towards u*, q' ~ q exp(lambda u), as far as a
trust region of `max_kl` nats lets it: that keeps the text. In the landing of equal_to the region
is larger: there the text is led to an end. Then p0 is set so that the mean value meets the
target, (1 - p0) E_q'[u] = u*, but an end is brought about in the landing only (`landing.py`). In
it the odds gain a factor: an end that the model finds unlikely stays unlikely, for it reads as a
cut. Taking probability from an early end has no limit; equal_to has none before its landing.

A text ends well where a sentence does. So candidates that end one gain too while the text is
longer than wanted, by more than the end of the text and a token sooner; right before the landing of
equal_to they lose, for the next sentence would be cut. Where no other sentence fits, the first
end that the model finds natural is taken.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lenvm_vllm.steering.constants import (
    BISECTIONS,
    LANDING_NATS,
    LARGEST_TILT,
    NATURAL,
    NO_END,
    SAME_VALUE,
    SENTENCE,
    SENTENCE_LEAD,
    SMALLEST_TILT,
)
from lenvm_vllm.steering.goals import Goals
from lenvm_vllm.steering.landing import sentence_gain
from value_server.contract.values import length_from_logit, value_from_length, value_from_logit


def steer(
    log_q: Tensor,
    log_p0: Tensor,
    own_end: Tensor,
    z: Tensor,
    closes: Tensor,
    goals: Goals,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The steered (log_q, log_p0).

    log_q: (B, K) log-probabilities, most probable first, -inf in padding; the `own` of each row
        sum to 1.
    log_p0: (B,) log-probability of the end, -inf where it is no candidate.
    own_end: (B,) bool, whether it would come by itself; else only `project` may bring it about.
    z: (B, K) value logits after each candidate; padding is ignored. NaN where a candidate was
        not scored: it counts with the mean of those that were. A row without any goes on as if
        its text would never end by itself; it is no tilt.
    closes: (B, K) bool, candidates that end a sentence.
    own: (B, K) bool, those inside the request's own cut, None: all; another one is an end of a
        sentence that `project` may bring about.
    """
    own = torch.ones_like(closes) if own is None else own
    alone = (z.isnan() | log_q.isneginf()).all(-1)
    goals = goals.without_values(alone)
    u = torch.where(alone[:, None], (~log_q.isneginf()).double(), _values(log_q, z))
    own_p0 = log_p0.masked_fill(~own_end, -torch.inf)
    greedy = goals.greedy & ~goals.tilts
    own_q = log_q.masked_fill(~own, -torch.inf)
    new_q, new_p0 = own_q.clone(), log_p0.clone()
    for chosen, policy in (
        (goals.tilts, _tilt),
        (greedy, _choose),
        (~goals.tilts & ~greedy, _project),
    ):
        if len(rows := chosen.nonzero()[:, 0]):
            # Kept candidates come first; those of a tilt may be many more than those of others.
            most = int((~log_q[rows].isneginf()).sum(-1).max())
            both = own_q[rows, :most], log_q[rows, :most]
            text = *both, u[rows, :most], closes[rows, :most]
            given = _Given(*text, log_p0[rows], own_p0[rows])
            new_q[rows, :most], new_p0[rows] = policy(given, goals.pick(rows))
    return new_q, new_p0


class _Given(NamedTuple):
    """Of the rows of one policy, as of `steer`. log_q, own_p0: of what would come by itself, else
    -inf; all_q: of all candidates."""

    log_q: Tensor
    all_q: Tensor
    u: Tensor
    closes: Tensor
    log_p0: Tensor
    own_p0: Tensor


def _values(log_q: Tensor, z: Tensor) -> Tensor:
    """(B, K) values, 0 in padding."""
    kept = ~log_q.isneginf()
    scored = kept & ~z.isnan()
    u = torch.where(scored, value_from_logit(z), 0.0)
    q = torch.where(scored, log_q.exp(), 0.0)
    mean = (q * u).sum(-1, keepdim=True) / q.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.where(kept & ~scored, mean, u)


def expected_rest(log_q: Tensor, log_p0: Tensor, z: Tensor, gamma: float) -> Tensor:
    """(B,) tokens to come behind the next one, in the mean of a steered distribution.

    Arguments as of `steer`; a candidate that was not scored counts with the mean of the others.
    """
    scored = ~log_q.isneginf() & ~z.isnan()
    q = torch.where(scored, log_q.exp(), 0.0)
    rest = torch.where(scored, length_from_logit(z, gamma), 0.0)
    mean = (q * rest).sum(-1) / q.sum(-1).clamp(min=1e-300)
    return -torch.expm1(log_p0) * mean


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0."""
    x = x.clamp(max=0)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _direction(mean: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(B,) +1 where values must rise, -1 where they must fall, 0 where all is well."""
    return (mean < low).double() - (mean > high).double()


def _project(given: _Given, goals: Goals) -> tuple[Tensor, Tensor]:
    """The smallest change of the distribution that meets the target: first the text, then its
    end."""
    _, _, u, _, log_p0, own_p0 = given
    text = _tilt_to_target(_close_sentence(given, goals), u, goals)
    return text, _decide_end(log_p0, own_p0, (text.exp() * u).sum(-1), goals)


def _close_sentence(given: _Given, goals: Goals) -> Tensor:
    """(B, K) q with other odds of the end of a sentence, where the text is near its own."""
    log_q, all_q, u, closes, *_ = given
    too_long = (log_q.exp() * u).sum(-1) > goals.bounds[1]
    closing = goals.closing
    before = goals.exact & (closing < 0) & goals.near_landing
    # Behind the landing, where no rail forces an end, short sentences would follow each other.
    now = too_long & (closing >= 0) & (closing <= 1)
    gain = torch.where(now, sentence_gain(closing), 0.0)
    gain = torch.where(before, -LANDING_NATS * SENTENCE_LEAD, gain)
    changed = closes.any(-1) & (gain != 0) & (goals.max_kl > 0)
    log_w = torch.where(gain[:, None] > 0, all_q, log_q)
    log_w = torch.addcmul(log_w, gain[:, None], closes.double())
    return torch.where(changed[:, None], log_w.log_softmax(-1), log_q)


def _tilt_to_target(log_q: Tensor, u: Tensor, goals: Goals) -> Tensor:
    """(B, K) KL projection of q on the target's side of E[u] = u*, inside the trust region."""
    kept = ~log_q.isneginf()
    mean = (log_q.exp() * u).sum(-1)
    bounds = goals.bounds
    direction = _direction(mean, *bounds)
    low = torch.where(kept, u, torch.inf).amin(-1)
    spread = torch.where(kept, u, -torch.inf).amax(-1) - low
    # Near no tilt at all the divergence is its rounding: a region of 0 is not left to bisection.
    # Nor are values that only rounding tells apart: they say nothing of the text.
    still = (direction == 0) | (goals.max_kl == 0) | (spread < SAME_VALUE)
    if still.all():
        return log_q
    u_star = torch.where(direction > 0, *bounds)
    spread = spread.clamp(min=SAME_VALUE)
    # (B, K), in [-1, 0] or [0, 1]: the same whatever the scale of u
    scaled = torch.where(kept, (u - low[:, None]) / spread[:, None], 0.0) * direction[:, None]
    rows = (~still).nonzero()[:, 0]  # the bisection is dear, and many texts are well as they are
    most = ((u_star - low) / spread * direction)[rows]
    size = _largest_tilt(log_q[rows], scaled[rows], most, goals.reach[rows])
    tilted = torch.addcmul(log_q[rows], size[:, None], scaled[rows]).log_softmax(-1)
    return log_q.index_copy(
        0, rows, torch.where((size == SMALLEST_TILT)[:, None], log_q[rows], tilted)
    )


def _largest_tilt(log_q: Tensor, scaled: Tensor, most: Tensor, reach: Tensor) -> Tensor:
    """(B,) the largest lambda that leaves the mean of `scaled` (B, K) at `most` (B,) or below it,
    and the divergence at `reach` (B,).

    Both grow with lambda, so one bisection, of its logarithm, finds that of all rows.
    """
    low = torch.full_like(most, SMALLEST_TILT)
    high = torch.full_like(most, LARGEST_TILT)
    # From the largest of them on, so that no weight of a large tilt overflows.
    last = scaled.amax(-1)
    scaled, most = scaled - last[:, None], most - last
    for _ in range(BISECTIONS):
        size = (low * high).sqrt()
        weights = torch.addcmul(log_q, size[:, None], scaled).exp_()
        total = weights.sum(-1)
        reached = weights.mul_(scaled).sum(-1) / total
        moved = size * reached - total.log()  # KL from q
        inside = (reached <= most) & (moved <= reach)
        low, high = torch.where(inside, size, low), torch.where(inside, high, size)
    return low


def _decide_end(log_p0: Tensor, own_p0: Tensor, mean: Tensor, goals: Goals) -> Tensor:
    """(B,) log p0 such that (1 - p0) mean is in bounds, as far as the landing allows.

    own_p0: as of `_project`. mean: (B,) E_q'[u].
    """
    there, p0, landed, room = log_p0.exp(), own_p0.exp(), goals.landed, goals.landing.closes
    # The lowest mean value that is all right allows the largest p0, and the highest the smallest.
    most, least = ((1 - u / mean.clamp(min=1e-300)).clamp(0, 1) for u in goals.bounds)
    most, least = (torch.where(p < NO_END, 0.0, p) for p in (most, least))
    most = most.masked_fill(goals.too_early | (goals.exact & (landed < 0)), 0)
    gained = torch.sigmoid(torch.logit(there) + LANDING_NATS * landed.clamp(0, 1))
    raised = torch.where(
        (landed < 0) | goals.short, p0, torch.maximum(p0, torch.minimum(least, gained))
    )
    new = torch.minimum(most, raised)
    beyond = mean > value_from_length(room.clamp(min=0), goals.gamma)
    last = (goals.exact & (goals.lowest <= 0)) | ((room < SENTENCE) & beyond)
    taken = last & (landed >= 0) & (there >= NATURAL) & ~goals.short
    new = torch.where((room < 1) | taken, 1.0, new)
    return torch.where((there == 0) | (new == p0), own_p0, new.log())


def _choose(given: _Given, goals: Goals) -> tuple[Tensor, Tensor]:
    """The paper's rule: all probability on one candidate, the end among them.

    equal_to: the value nearest u*. at_most: always the smallest value, which is the end's wherever
    it is a candidate. at_least: always the largest, so that the text ends where nothing else is
    left. A range is not the paper's: the smallest while the model's own mean value is above it, the
    largest while below. Nor are rails, which bar an end that comes too early.
    """
    log_q, _, u, _, _, log_p0 = given
    low, high = goals.bounds
    may_end = ~log_p0.isneginf() & ~goals.too_early
    # (B, K + 1): the end comes first, so that it wins a tie
    values = torch.cat([torch.zeros_like(low)[:, None], u], dim=-1)
    allowed = torch.cat([may_end[:, None], ~log_q.isneginf()], dim=-1)

    ended = torch.where(may_end, log_p0.exp(), 0.0)
    broken = _direction((1 - ended) * (log_q.exp() * u).sum(-1), low, high)
    direction = torch.where(goals.extreme != 0, goals.extreme, broken)
    near = (values - low[:, None]).abs()
    cost = torch.where(goals.exact[:, None], near, -direction[:, None] * values)
    choice = torch.where(allowed, cost, torch.inf).argmin(-1)
    free = (direction == 0) & ~goals.exact
    one_hot = torch.nn.functional.one_hot(choice, values.shape[-1]).double().log()
    # Where the end is chosen q is of no account; keep it a distribution.
    chose_end = (choice == 0) | free
    new_q = torch.where(chose_end[:, None], log_q, one_hot[:, 1:])
    new_p0 = torch.where(free, torch.where(may_end, log_p0, -torch.inf), one_hot[:, 0])
    return new_q, new_p0


def _tilt(given: _Given, goals: Goals) -> tuple[Tensor, Tensor]:
    """p' ~ p exp(beta u) over all candidates, the end (u = 0) among them."""
    log_q, _, u, _, _, log_p0 = given
    log_w = log_q + goals.beta[:, None] * u
    rest = log_w.logsumexp(-1)
    total = torch.logaddexp(log_p0, log1mexp(log_p0) + rest)
    return log_w - rest[:, None], log_p0 - total

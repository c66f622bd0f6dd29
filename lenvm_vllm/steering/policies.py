"""Steering maths: from the model's distribution and values to the steered distribution.

Legend: B guided rows, K candidates that do not end the text (padded), all tensors float64 on
the CPU. q: the model's distribution over those K, p0: its probability of end-of-sequence, so
p(x) = (1 - p0) q(x). u = 1 - gamma^r as in value_server.contract.values; u(end) = 0 is known.
u* = 1 - gamma^r*, the value that meets the target; each mode keeps the mean value in an interval,
[u*, u*] for equal_to, [0, u*] for at_most, [u*, 1] for at_least.

End-of-sequence is no token like the others: its probability *is* the length decision. So
`project` works in two parts. First q is tilted towards u*, q' ~ q exp(lambda u), as far as a
trust region of `max_kl` nats lets it: that keeps the text. In the landing of equal_to the region
is LANDING_REACH times as large: there the text is led to an end. Then p0 is set so that the mean
value meets the target, (1 - p0) E_q'[u] = u*, but an end is brought about in the landing only,
the last stretch of the text:

    equal_to         N - w/2 ... N ............ N + w
    at_most, range   N - 2w ................... N         (N: the highest)
    landed           0 ........................ 1
    [end not raised )[ odds of the end gain up to    ) taken if it is possible
                       LANDING_NATS times landed

Before it the text has time to find a better end, and many small chances of an early one would
add up to it. In it the odds gain a factor: an end that the model finds unlikely stays unlikely,
for it reads as a cut. Taking probability from an early end has no limit; equal_to has none
before its landing.

A text ends well where a sentence does. So candidates that end one gain too while the text is
longer than wanted, by half as much more and a token sooner; right before the landing of
equal_to they lose, for the next sentence would be cut. Where no other sentence fits, the first
end that the model finds natural is taken.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lenvm_vllm.target.rails import EARLY, TWICE
from lenvm_vllm.target.request import NATURAL
from lenvm_vllm.text.sentences import SENTENCE
from value_server.contract.values import length_from_logit, value_from_length, value_from_logit

MODES = ("equal_to", "at_most", "at_least", "tilt", "range")
EQUAL_TO, AT_MOST, AT_LEAST, TILT, RANGE = range(5)

_BISECTIONS = 32
# On values scaled to a spread of 1: below it nothing moves, beyond it only the extreme one is left.
_SMALLEST_TILT, _LARGEST_TILT = 1e-6, 1e4
_SAME = 1e-9  # values nearer to each other than this are one
_NEVER = 1e-9  # probabilities of an end below this are rounding: none
LANDING_NATS = 6.0  # a third of it at the target of equal_to
LANDING_REACH = 6.0  # times max_kl, in the landing of equal_to


@dataclass(frozen=True)
class Goals:
    """What each of B rows wants.

    mode: (B,) index in MODES. greedy: (B,) bool, policy. remaining, ceiling: (B,) r* in tokens
    of the target, of a range its lower and upper end; negative past it. landing: (B,) w in
    tokens. beta, max_kl: (B,). Entries that a mode does not use are ignored.
    """

    mode: Tensor
    greedy: Tensor
    remaining: Tensor
    ceiling: Tensor
    landing: Tensor
    beta: Tensor
    max_kl: Tensor
    gamma: float

    def bounds(self) -> tuple[Tensor, Tensor]:
        """(B,) lowest and highest mean value that is all right."""
        low = value_from_length(self.remaining.clamp(min=0), self.gamma)
        high = value_from_length(self.ceiling.clamp(min=0), self.gamma)
        return low.masked_fill(self.mode == AT_MOST, 0), high.masked_fill(self.mode == AT_LEAST, 1)

    @property
    def room(self) -> Tensor:
        """(B,) tokens from this one to the last of the landing; below 1 it is that or past it."""
        return self.ceiling + torch.where(self.mode == EQUAL_TO, self.landing, 0.0)

    @property
    def span(self) -> Tensor:
        """(B,) tokens of the landing."""
        return torch.where(self.mode == EQUAL_TO, 1 + EARLY, TWICE) * self.landing

    @property
    def landed(self) -> Tensor:
        """(B,) share of the landing that is behind, below 0 before it."""
        return 1 - self.room / self.span.clamp(min=1e-9)

    @property
    def raises_ends(self) -> Tensor:
        """(B,) bool: in the landing, or past it."""
        return (self.landed >= 0) & (self.mode != AT_LEAST) & (self.mode != TILT)

    @property
    def closing(self) -> Tensor:
        """(B,) as `landed`, of the next token: where this one may end the last sentence."""
        return 1 - (self.room - 1) / self.span.clamp(min=1e-9)

    @property
    def heeds_sentences(self) -> Tensor:
        """(B,) bool: whether the end of a sentence may be more or less likely than by itself."""
        near = (self.room - self.span <= SENTENCE) & (self.closing <= 1)
        return near & ~self.greedy & (self.mode != AT_LEAST) & (self.mode != TILT)

    @property
    def reach(self) -> Tensor:
        """(B,) nats that the values may move the text in this step."""
        landing = (self.mode == EQUAL_TO) & (self.landed >= 0) & (self.landed <= 1)
        return torch.where(landing, LANDING_REACH * self.max_kl, self.max_kl)

    @property
    def too_early(self) -> Tensor:
        """(B,) bool: no end yet, whatever its value."""
        return ((self.mode == AT_LEAST) | (self.mode == RANGE)) & (self.remaining > 0)


def steer(
    log_q: Tensor, log_p0: Tensor, own_end: Tensor, z: Tensor, closes: Tensor, goals: Goals
) -> tuple[Tensor, Tensor]:
    """The steered (log_q, log_p0).

    log_q: (B, K) log-probabilities, most probable first, -inf in padding; each row sums to 1.
    log_p0: (B,) log-probability of the end, -inf where it is no candidate.
    own_end: (B,) bool, whether it would come by itself; else only `project` may bring it about.
    z: (B, K) value logits after each candidate; padding is ignored. NaN where a candidate was
        not scored: it counts with the mean of those that were.
    closes: (B, K) bool, candidates that end a sentence.
    """
    u = _values(log_q, z)
    tilt = goals.mode == TILT
    greedy = goals.greedy & ~tilt
    new_q, new_p0 = log_q, log_p0
    own_p0 = log_p0.masked_fill(~own_end, -torch.inf)
    if (project := ~tilt & ~greedy).any():
        text = _tilt_to_target(_close_sentence(log_q, u, closes, goals), u, goals)
        end = _decide_end(log_p0, own_p0, (text.exp() * u).sum(-1), goals)
        new_q, new_p0 = (
            torch.where(project[:, None], text, new_q),
            torch.where(project, end, new_p0),
        )
    for chosen, policy in ((tilt, _tilt), (greedy, _choose)):
        if chosen.any():
            q, p0 = policy(log_q, own_p0, u, goals)
            new_q, new_p0 = torch.where(chosen[:, None], q, new_q), torch.where(chosen, p0, new_p0)
    return new_q, new_p0


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


def _close_sentence(log_q: Tensor, u: Tensor, closes: Tensor, goals: Goals) -> Tensor:
    """(B, K) q with other odds of the end of a sentence, where the text is near its own."""
    too_long = (log_q.exp() * u).sum(-1) > goals.bounds()[1]
    closing, exact = goals.closing, goals.mode == EQUAL_TO
    before = exact & (closing < 0) & (goals.room - goals.span <= SENTENCE)
    # Behind the landing, where no rail forces an end, short sentences would follow each other.
    now = too_long & (closing >= 0) & (closing <= 1)
    gain = torch.where(now, LANDING_NATS * (closing + 0.5), 0.0)
    gain = torch.where(before, -LANDING_NATS / 2, gain)
    changed = closes.any(-1) & (gain != 0) & (goals.max_kl > 0) & (goals.mode != AT_LEAST)
    log_w = torch.addcmul(log_q, gain[:, None], closes.double())
    return torch.where(changed[:, None], log_w.log_softmax(-1), log_q)


def _tilt_to_target(log_q: Tensor, u: Tensor, goals: Goals) -> Tensor:
    """(B, K) KL projection of q on the target's side of E[u] = u*, inside the trust region.

    The mean and the divergence both grow with the size of lambda, so the largest lambda that
    neither passes u* nor leaves the trust region is found for all rows by one bisection, of
    its logarithm.
    """
    kept = ~log_q.isneginf()
    mean = (log_q.exp() * u).sum(-1)
    bounds = goals.bounds()
    direction, reach = _direction(mean, *bounds), goals.reach
    low = torch.where(kept, u, torch.inf).amin(-1)
    spread = torch.where(kept, u, -torch.inf).amax(-1) - low
    # Near no tilt at all the divergence is its rounding: a region of 0 is not left to bisection.
    # Nor are values that only rounding tells apart: they say nothing of the text.
    still = (direction == 0) | (goals.max_kl == 0) | (spread < _SAME)
    if still.all():
        return log_q
    u_star = torch.where(direction > 0, *bounds)
    spread = spread.clamp(min=_SAME)
    # (B, K), in [-1, 0] or [0, 1]: the same whatever the scale of u
    scaled = torch.where(kept, (u - low[:, None]) / spread[:, None], 0.0) * direction[:, None]
    most = (u_star - low) / spread * direction  # that the mean of `scaled` may reach

    low_size = torch.full_like(mean, _SMALLEST_TILT)
    high_size = torch.full_like(mean, _LARGEST_TILT)
    for _ in range(_BISECTIONS):
        size = (low_size * high_size).sqrt()
        log_w = torch.addcmul(log_q, size[:, None], scaled)
        log_t = log_w.log_softmax(-1)
        reached = (log_t.exp() * scaled).sum(-1)
        # KL of t from q, by the normaliser, which the first candidate, never a padded one, tells
        moved = torch.addcmul(log_t[:, 0] - log_w[:, 0], size, reached)
        inside = (reached <= most) & (moved <= reach)
        low_size = torch.where(inside, size, low_size)
        high_size = torch.where(inside, high_size, size)
    tilted = torch.addcmul(log_q, low_size[:, None], scaled).log_softmax(-1)
    return torch.where((still | (low_size == _SMALLEST_TILT))[:, None], log_q, tilted)


def _decide_end(log_p0: Tensor, own_p0: Tensor, mean: Tensor, goals: Goals) -> Tensor:
    """(B,) log p0 such that (1 - p0) mean is in bounds, as far as the landing allows.

    own_p0: (B,) what it is by itself, log_p0 or -inf. mean: (B,) E_q'[u].
    """
    there, p0, landed, exact = log_p0.exp(), own_p0.exp(), goals.landed, goals.mode == EQUAL_TO
    # The lowest mean value that is all right allows the largest p0, and the highest the smallest.
    most, least = ((1 - u / mean.clamp(min=1e-300)).clamp(0, 1) for u in goals.bounds())
    most, least = (torch.where(p < _NEVER, 0.0, p) for p in (most, least))
    most = most.masked_fill(goals.too_early | (exact & (landed < 0)), 0)
    gained = torch.sigmoid(torch.logit(there) + LANDING_NATS * landed.clamp(0, 1))
    raised = torch.where(landed < 0, p0, torch.maximum(p0, torch.minimum(least, gained)))
    new = torch.where(most < p0, most, raised)
    beyond = mean > value_from_length(goals.room.clamp(min=0), goals.gamma)
    last = (exact & (goals.remaining <= 0)) | ((goals.room < SENTENCE) & beyond)
    taken = last & (landed >= 0) & (there >= NATURAL) & ~goals.too_early
    due = (goals.room < 1) | taken
    new = torch.where(due & (goals.mode != AT_LEAST), 1.0, new)
    return torch.where((there == 0) | (new == p0), own_p0, new.log())


def _choose(log_q: Tensor, log_p0: Tensor, u: Tensor, goals: Goals) -> tuple[Tensor, Tensor]:
    """The paper's rule: all probability on one candidate, the end among them.

    equal_to: the value nearest u*. Other modes: the smallest while the model's own mean value
    is above their bounds, the largest while it is below. Too early there is no end.
    """
    low, high = goals.bounds()
    may_end = ~log_p0.isneginf() & ~goals.too_early
    # (B, K + 1): the end comes first, so that it wins a tie
    values = torch.cat([torch.zeros_like(low)[:, None], u], dim=-1)
    allowed = torch.cat([may_end[:, None], ~log_q.isneginf()], dim=-1)

    ended = torch.where(may_end, log_p0.exp(), 0.0)
    direction = _direction((1 - ended) * (log_q.exp() * u).sum(-1), low, high)
    exact = goals.mode == EQUAL_TO
    near = (values - low[:, None]).abs()
    cost = torch.where(exact[:, None], near, -direction[:, None] * values)
    choice = torch.where(allowed, cost, torch.inf).argmin(-1)
    free = (direction == 0) & ~exact
    one_hot = torch.nn.functional.one_hot(choice, values.shape[-1]).double().log()
    # Where the end is chosen q is of no account; keep it a distribution.
    chose_end = (choice == 0) | free
    new_q = torch.where(chose_end[:, None], log_q, one_hot[:, 1:])
    new_p0 = torch.where(free, torch.where(may_end, log_p0, -torch.inf), one_hot[:, 0])
    return new_q, new_p0


def _tilt(log_q: Tensor, log_p0: Tensor, u: Tensor, goals: Goals) -> tuple[Tensor, Tensor]:
    """p' ~ p exp(beta u) over all candidates, the end (u = 0) among them."""
    log_w = log_q + goals.beta[:, None] * u
    rest = log_w.logsumexp(-1)
    total = torch.logaddexp(log_p0, log1mexp(log_p0) + rest)
    return log_w - rest[:, None], log_p0 - total

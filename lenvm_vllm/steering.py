"""Steering maths: from the model's distribution and values to the steered distribution.

Legend: B guided rows, K candidates that do not end the text (padded), all tensors float64 on
the CPU. q: the model's distribution over those K, p0: its probability of end-of-sequence, so
p(x) = (1 - p0) q(x). u = 1 - gamma^r as in value_server.contract.values; u(end) = 0 is known.
u* = 1 - gamma^r*, the value that meets the target.

End-of-sequence is no token like the others: its probability *is* the length decision. So
`project` works in two parts. First q is tilted towards u*, q' ~ q exp(lambda u), as far as a
trust region of `max_kl` nats lets it: that keeps the text. Then p0 is set so that the mean
value meets the target, (1 - p0) E_q'[u] = u*. Taking probability from an early end has no
limit; giving some to an end before its time stays in the trust region, for an end that the
model finds unlikely reads as a cut. Where nothing may follow (r* = 0) a possible end is taken.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from value_server.contract.values import value_from_length, value_from_logit

MODES = ("equal_to", "at_most", "at_least", "tilt")
EQUAL_TO, AT_MOST, AT_LEAST, TILT = range(4)

_BISECTIONS = 50
_LARGEST_TILT = 1e4  # on values scaled to a spread of 1: beyond it only the extreme one is left
_NEVER = 1e-9  # probabilities of an end below this are rounding: none


@dataclass(frozen=True)
class Goals:
    """What each of B rows wants.

    mode: (B,) index in MODES. greedy: (B,) bool, policy. remaining: (B,) r* in tokens, negative
    past the target. beta, max_kl: (B,). Entries that a mode does not use are ignored.
    """

    mode: Tensor
    greedy: Tensor
    remaining: Tensor
    beta: Tensor
    max_kl: Tensor
    gamma: float


def steer(log_q: Tensor, log_p0: Tensor, z: Tensor, goals: Goals) -> tuple[Tensor, Tensor]:
    """The steered (log_q, log_p0).

    log_q: (B, K) log-probabilities, most probable first, -inf in padding; each row sums to 1.
    log_p0: (B,) log-probability of the end, -inf where it is no candidate.
    z: (B, K) value logits after each candidate; padding is ignored.
    """
    u = torch.where(log_q.isneginf(), 0.0, value_from_logit(z))
    u_star = value_from_length(goals.remaining.clamp(min=0), goals.gamma)

    projected_q = _project(log_q, u, u_star, goals)
    projected_p0 = _decide_end(log_p0, (projected_q.exp() * u).sum(-1), u_star, goals)
    greedy_q, greedy_p0 = _choose(log_q, log_p0, u, u_star, goals)
    tilted_q, tilted_p0 = _tilt(log_q, log_p0, u, goals.beta)

    greedy, tilt = goals.greedy, goals.mode == TILT
    new_p0 = torch.where(greedy, greedy_p0, projected_p0)
    new_q = torch.where(greedy[:, None], greedy_q, projected_q)
    return torch.where(tilt[:, None], tilted_q, new_q), torch.where(tilt, tilted_p0, new_p0)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0."""
    x = x.clamp(max=0)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _direction(mean: Tensor, u_star: Tensor, mode: Tensor) -> Tensor:
    """(B,) +1 where values must rise, -1 where they must fall, 0 where all is well."""
    rise = (mean < u_star) & (mode != AT_MOST)
    fall = (mean > u_star) & (mode != AT_LEAST)
    return rise.double() - fall.double()


def _project(log_q: Tensor, u: Tensor, u_star: Tensor, goals: Goals) -> Tensor:
    """(B, K) KL projection of q on the target's side of E[u] = u*, inside the trust region.

    The mean and the divergence both grow with the size of lambda, so the largest lambda that
    neither passes u* nor leaves the trust region is found for all rows by one bisection.
    """
    kept = ~log_q.isneginf()
    mean = (log_q.exp() * u).sum(-1)
    direction = _direction(mean, u_star, goals.mode)
    low = torch.where(kept, u, torch.inf).amin(-1)
    spread = (torch.where(kept, u, -torch.inf).amax(-1) - low).clamp(min=1e-300)
    # (B, K), in [-1, 0] or [0, 1]: the same whatever the scale of u
    scaled = torch.where(kept, (u - low[:, None]) / spread[:, None], 0.0) * direction[:, None]

    def tilted(size: Tensor) -> Tensor:
        return torch.log_softmax(log_q + size[:, None] * scaled, dim=-1)

    low_size = torch.zeros_like(mean)
    high_size = torch.where(direction == 0, 0.0, _LARGEST_TILT)
    for _ in range(_BISECTIONS):
        size = (low_size + high_size) / 2
        log_t = tilted(size)
        t = log_t.exp()
        moved = torch.where(kept, t * (log_t - log_q), 0.0).sum(-1)
        inside = (direction * (u_star - (t * u).sum(-1)) >= 0) & (moved <= goals.max_kl)
        low_size = torch.where(inside, size, low_size)
        high_size = torch.where(inside, high_size, size)
    return torch.where((direction == 0)[:, None], log_q, tilted(low_size))


def _decide_end(log_p0: Tensor, mean: Tensor, u_star: Tensor, goals: Goals) -> Tensor:
    """(B,) log p0 such that (1 - p0) mean meets u*, as the mode asks. mean: (B,) E_q'[u]."""
    p0, due = log_p0.exp(), goals.remaining <= 0
    wanted = (1 - u_star / mean.clamp(min=1e-300)).clamp(0, 1)
    wanted = torch.where(wanted < _NEVER, 0.0, wanted)
    raised = _raise_within(p0, wanted, goals.max_kl)
    new = torch.where(wanted < p0, wanted, raised)
    new = torch.where(goals.mode == AT_MOST, torch.maximum(p0, raised), new)
    new = torch.where(due, 1.0, new)
    new = torch.where(goals.mode == AT_LEAST, torch.where(due, p0, 0.0), new)
    return torch.where((p0 == 0) | (new == p0), log_p0, new.log())


def _raise_within(p0: Tensor, wanted: Tensor, max_kl: Tensor) -> Tensor:
    """(B,) the largest probability up to `wanted` whose KL from p0 is at most max_kl."""
    low, high = p0, torch.maximum(p0, wanted)
    for _ in range(_BISECTIONS):
        p = (low + high) / 2
        moved = torch.special.xlogy(p, p / p0) + torch.special.xlogy(1 - p, (1 - p) / (1 - p0))
        inside = ~(moved > max_kl)
        low, high = torch.where(inside, p, low), torch.where(inside, high, p)
    return high


def _choose(
    log_q: Tensor, log_p0: Tensor, u: Tensor, u_star: Tensor, goals: Goals
) -> tuple[Tensor, Tensor]:
    """The paper's rule: all probability on one candidate, the end among them.

    equal_to: the value nearest u*. at_most: the smallest, at_least: the largest, each while
    the model's own mean value breaks the limit. Before at_least's target there is no end.
    """
    mode, kept, due = goals.mode, ~log_q.isneginf(), goals.remaining <= 0
    may_end = ~log_p0.isneginf() & ((mode != AT_LEAST) | due)
    # (B, K + 1): the end comes first, so that it wins a tie
    values = torch.cat([torch.zeros_like(u_star)[:, None], u], dim=-1)
    allowed = torch.cat([may_end[:, None], kept], dim=-1)
    sign = torch.where(mode == AT_LEAST, -1.0, 1.0)[:, None]
    near = (values - u_star[:, None]).abs()
    cost = torch.where((mode == EQUAL_TO)[:, None], near, sign * values)
    choice = torch.where(allowed, cost, torch.inf).argmin(-1)

    ended = torch.where(may_end, log_p0.exp(), 0.0)
    mean = (1 - ended) * (log_q.exp() * u).sum(-1)
    free = (_direction(mean, u_star, mode) == 0) & (mode != EQUAL_TO)
    one_hot = torch.nn.functional.one_hot(choice, values.shape[-1]).double().log()
    # Where the end is chosen q is of no account; keep it a distribution.
    chose_end = (choice == 0) | free
    new_q = torch.where(chose_end[:, None], log_q, one_hot[:, 1:])
    new_p0 = torch.where(free, torch.where(may_end, log_p0, -torch.inf), one_hot[:, 0])
    return new_q, new_p0


def _tilt(log_q: Tensor, log_p0: Tensor, u: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """p' ~ p exp(beta u) over all candidates, the end (u = 0) among them."""
    log_w = log_q + beta[:, None] * u
    rest = log_w.logsumexp(-1)
    total = torch.logaddexp(log_p0, log1mexp(log_p0) + rest)
    return log_w - rest[:, None], log_p0 - total

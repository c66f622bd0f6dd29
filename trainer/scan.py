"""A linear recursion from the end of a sequence to its start, without a loop over tokens."""

from torch import Tensor


def backward_scan(factors: Tensor, terms: Tensor) -> Tensor:
    """x_t = terms_t + factors_t · x_{t+1}, with nothing after the last; all (B, T).

    Doubling: after k rounds x_t has taken in the 2^k terms from t on.
    """
    a, x = factors.clone(), terms.clone()
    step = 1
    while step < x.shape[1]:
        x[:, :-step] += a[:, :-step] * x[:, step:].clone()
        a[:, :-step] *= a[:, step:].clone()
        a[:, -step:] = 0
        step *= 2
    return x

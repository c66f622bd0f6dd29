"""Texts that a perfect value model steers."""

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.support.steering_rows import Row, batched
from value_server.contract.values import remaining_goal

LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377)


@dataclass
class ToyText:
    """A text that knows how many tokens it wants yet; a token may change its mind to any of
    LENGTHS. It may end at any time, and does so, mostly, when it wants one token more. Steered
    with a count that is off by one it lands elsewhere: its end comes by luck one time in twenty.
    """

    target: int
    mode: str
    policy: str
    wants: int = 50
    generated: int = 0
    ended: bool = False

    def row(self) -> Row:
        r = tuple(sorted({*LENGTHS, max(1, self.wants - 1)}))
        weights = [10.0 if length == self.wants - 1 else 1.0 for length in r]
        return Row(
            q=tuple(w / sum(weights) for w in weights),
            r=r,
            p0=0.95 if self.wants == 1 else 0.05,
            mode=self.mode,
            greedy=self.policy == "greedy",
            remaining=remaining_goal(self.target, self.generated),
            landing=0.1 * self.target,
            max_kl=math.inf,
        )

    def sample(self, q: list[float], p0: float, rng: random.Random) -> None:
        self.generated += 1
        self.ended = rng.random() < p0
        self.wants = rng.choices(self.row().r, q)[0]


def write(texts: list[ToyText]) -> None:
    """All texts to their ends in one batch, without rails."""
    rng = random.Random(0)
    while running := [text for text in texts if not text.ended]:
        assert running[0].generated < 1000
        for text, (q, p0) in zip(running, batched([t.row() for t in running]), strict=True):
            text.sample(q, p0, rng)


@pytest.mark.parametrize("policy", ["project", "greedy"])
def test_perfect_values_land_on_the_target(policy: str) -> None:
    texts = [ToyText(target, "equal_to", policy) for target in (1, 2, 32, 200) for _ in range(5)]
    write(texts)
    assert [text.generated for text in texts] == [text.target for text in texts]


def test_perfect_values_keep_the_limits() -> None:
    at_most = [ToyText(target, "at_most", "project") for target in (1, 2, 32) for _ in range(20)]
    at_least = [ToyText(target, "at_least", "project") for target in (1, 2, 32) for _ in range(20)]
    write([*at_most, *at_least])
    assert all(text.generated <= text.target for text in at_most)
    assert all(text.generated >= text.target for text in at_least)
    assert any(text.generated != text.target for text in at_most)


def test_the_papers_rule_takes_the_extreme_value_whatever_the_limit() -> None:
    """at_most ends at once where it may, also far below its limit; at_least never ends by itself,
    also far past its own. Where no end is possible it takes the shortest way on, or the longest."""
    text: dict[str, Any] = {"q": (0.6, 0.3, 0.1), "r": (20, 40, 60), "greedy": True}
    for remaining in (-5, 10, 500):
        for railed in (False, True):
            at_most = Row(mode="at_most", remaining=remaining, railed=railed, **text)
            at_least = replace(at_most, mode="at_least")
            (shortest, _), (longest, end) = batched([at_most, replace(at_least, p0=0.9)])
            assert shortest == [1, 0, 0]
            assert (longest, end) == ([0, 0, 1], 0)
            assert batched([replace(at_most, p0=1e-6)])[0][1] == 1
    texts = [ToyText(target, "at_most", "greedy") for target in (1, 2, 32) for _ in range(5)]
    write(texts)
    assert {text.generated for text in texts} == {1}


def test_without_rails_nothing_bars_an_early_end() -> None:
    """The bug guarded against: a lower bound that was built in made LS 100 of any at_least."""
    sure = Row(q=(1.0,), r=(90,), p0=0.6, mode="at_least", remaining=10)
    for greedy, without, railed in ((True, 0.0, 0.0), (False, 0.6, 0.0)):
        rows = [replace(sure, greedy=greedy, railed=on) for on in (False, True)]
        ends = [p0 for _, p0 in batched(rows)]
        assert ends == pytest.approx([without, railed])


def drifting_text(target: int) -> int:
    """Completion tokens of a text that ends when nothing is left to say and only then.

    A token can put its length off by three at most: greedy has to walk there in time.
    """
    wants = 60
    for generated in range(1000):
        if wants == 1:
            return generated + 1
        r = tuple(range(max(1, wants - 4), wants + 3))
        q = (1 / len(r),) * len(r)
        row = Row(q=q, r=r, greedy=True, remaining=remaining_goal(target, generated))
        wants = r[max(range(len(r)), key=batched([row])[0][0].__getitem__)]
    raise AssertionError("the text does not end")


@pytest.mark.parametrize("target", [25, 32, 60, 100])
def test_greedy_walks_to_the_target(target: int) -> None:
    assert drifting_text(target) == target

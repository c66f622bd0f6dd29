"""How much goes into the next forward pass. Plain Python, no torch.

A step waits for the pass that runs when it comes, so a pass of a long prompt takes at most half
of the time that steps have: as long as some with a budget come, it has as many tokens as fit into
that, by the mean speed of the last passes. The pass of a step has none of a long prompt, except
for one in a while, lest prompts starve where steps follow each other without a gap.

A pass that fails, for want of memory perhaps, is tried again with half of its tokens, down to
LEAST, then with one row. What works makes passes larger again, slowly.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

RECENT_S = 1.0  # a budget counts for so long
SHARE = 0.5  # of the smallest budget, for a pass
BESIDE = 8  # passes of steps, from one that may have tokens of a long prompt to the next
LEAST = 16  # tokens of a pass or a prefill, whatever the budget, whatever fails
KEPT = 0.9  # of the sums of time and tokens, from pass to pass
RESTORE = 16  # passes that work, until they may be twice as large
MOST_FAILURES = 16  # passes in a row, of ever less and other work, until the engine is broken


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a pass: tokens and candidates in all, tokens of long texts, rows (None: any number).

    beside: whether long texts may go into a pass of short ones.
    """

    tokens: int
    prefill: int
    rows: int | None = None
    beside: bool = True


class Pace:
    """Says the limits of the next pass. `asked` may be called from any thread, the rest from one.

    failures: passes that failed since one has worked; failed: in all.
    """

    def __init__(
        self, tokens: int, prefill: int, now: Callable[[], float] = time.perf_counter
    ) -> None:
        """tokens, prefill: the limits where nothing speaks for less."""
        self.failures = self.failed = 0
        self._tokens, self._prefill, self._now = tokens, prefill, now
        self._most, self._alone, self._worked = tokens, False, 0
        self._seconds = self._queries = 0.0
        # (when, budget), ever larger ones: one that is larger than a later one is the smallest of
        # no second to come.
        self._budgets: deque[tuple[float, float]] = deque()
        self._lock = Lock()

    def asked(self, budget: float | None) -> None:
        """A step has come that waits `budget` seconds; None and 0 wait for no pass."""
        if budget:
            with self._lock:
                while self._budgets and self._budgets[-1][1] >= budget:
                    self._budgets.pop()
                self._budgets.append((self._now(), budget))

    def limits(self) -> Limits:
        tokens = min(self._most, self._tokens)
        in_time = self._in_time()
        prefill = max(LEAST, min(tokens, self._prefill if in_time is None else in_time))
        beside = in_time is None or self._worked % BESIDE == 0
        return Limits(tokens, prefill, 1 if self._alone else None, beside)

    def worked(self, queries: int, seconds: float) -> None:
        """A pass of so many tokens and candidates took so long."""
        self.failures, self._alone = 0, False
        self._seconds = KEPT * self._seconds + seconds
        self._queries = KEPT * self._queries + queries
        self._worked += 1
        if self._worked % RESTORE == 0:
            self._most = min(2 * self._most, self._tokens)

    def fails(self, queries: int) -> bool:
        """A pass failed; whether it could not be any smaller than it was."""
        self.failures += 1
        self.failed += 1
        self._worked = 0
        least = queries <= LEAST and self._alone
        self._alone = queries <= LEAST
        if queries > LEAST:
            self._most = max(LEAST, queries // 2)
        return least

    @property
    def broken(self) -> bool:
        return self.failures >= MOST_FAILURES

    def _in_time(self) -> int | None:
        """Tokens that fit into a share of the smallest recent budget; None where there is none."""
        recent = self._now() - RECENT_S
        with self._lock:
            while self._budgets and self._budgets[0][0] < recent:
                self._budgets.popleft()
            smallest = self._budgets[0][1] if self._budgets else None
        if smallest is None or not self._queries:
            return None
        fitting = SHARE * smallest * self._queries / max(self._seconds, 1e-9)
        return int(min(self._prefill, fitting))

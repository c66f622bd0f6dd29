"""How long one server's answer is waited for: a little longer than such answers usually take, so
that a server that becomes slow is noticed before anybody's tokens come late."""

from dataclasses import dataclass

# Late answers in a row from which on nobody waits, until one is in time: a step may wait in vain
# three times, not for ever. One that takes several times as long as it may counts as so many.
LATE_ANSWERS = 3
# An answer may take so many times the mean, or so many mean deviations above it, as of TCP's timer.
# By hand: with the deviations alone every ninth answer of a healthy server was late.
TIMES, DEVIATIONS = 2.0, 4.0
# Weight of an answer in the running means. One that takes longer than usual counts less, and a late
# one hardly: what waits grow by must not be the waits themselves. A server that has become slower
# for good is waited for after some hundred answers.
WEIGHT, LONGER_WEIGHT, LATE_WEIGHT = 0.1, 0.02, 0.002
FEW = 8  # answers that are too few to tell what is usual


@dataclass
class _Usual:
    """seconds, deviation: running means, of `count` answers."""

    seconds: float = 0.0
    deviation: float = 0.0
    count: int = 0

    @property
    def longest(self) -> float:
        """Seconds that such an answer may take."""
        return max(TIMES * self.seconds, self.seconds + DEVIATIONS * self.deviation)

    def note(self, took: float, weight: float) -> None:
        weight = max(weight, 1 / (self.count + 1)) if self.count < FEW else weight
        off = abs(took - self.seconds) if self.count else took / 2
        self.deviation += weight * (off - self.deviation)
        self.seconds += weight * (took - self.seconds)
        self.count += 1


class Patience:
    def __init__(self) -> None:
        self._usual: dict[int, _Usual] = {}  # by the bits of the number of candidates
        self.late = 0  # answers in a row, longer ones several times

    @property
    def is_slow(self) -> bool:
        return self.late >= LATE_ANSWERS

    def seconds(self, candidates: int, least: float, most: float) -> float:
        """That an answer for so many candidates, or queries, may take, within these bounds.

        Where too few have come, one for fewer candidates tells it: in proportion, at the most.
        """
        bits = candidates.bit_length()
        known = [n for n, usual in self._usual.items() if usual.count >= FEW]
        if not known:
            return most
        near = min(known, key=lambda n: (abs(n - bits), -n))
        wait = self._usual[near].longest * 2.0 ** max(0, bits - near)
        return min(most, max(least, wait))

    def note(self, candidates: int, took: float, allowed: float, late: bool) -> None:
        """An answer has come, after so many seconds of those that it was allowed."""
        self.late = self.late + max(1, int(took / max(allowed, 1e-3))) if late else 0
        usual = self._usual.setdefault(candidates.bit_length(), _Usual())
        weight = LATE_WEIGHT if late else LONGER_WEIGHT if took > usual.seconds else WEIGHT
        usual.note(min(took, allowed) if usual.count < FEW else took, weight)

    def forget(self) -> None:
        """The server is another one, or was started anew."""
        self._usual, self.late = {}, 0

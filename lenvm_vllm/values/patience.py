"""How long one server's answer is waited for: a little longer than such answers usually take, so
that a server that becomes slow is noticed before anybody's tokens come late."""

from dataclasses import dataclass

# Late answers in a row from which on nobody waits, until one is in time: a step may wait in vain
# three times, not for ever.
LATE_ANSWERS = 3
# Mean deviations above the mean that an answer may take. By hand, as for TCP's timer.
DEVIATIONS = 4.0
# Weight of an answer in the running means; of a late one it is small, so that a server that has
# become slower for good is waited for after some hundred answers, and none that stumbles.
WEIGHT, LATE_WEIGHT = 0.1, 0.002
FEW = 8  # answers that are too few to tell what is usual


@dataclass
class _Usual:
    """seconds, deviation: running means, of `count` answers."""

    seconds: float = 0.0
    deviation: float = 0.0
    count: int = 0

    def note(self, took: float, weight: float) -> None:
        weight = max(weight, 1 / (self.count + 1)) if self.count < FEW else weight
        off = abs(took - self.seconds) if self.count else took / 2
        self.deviation += weight * (off - self.deviation)
        self.seconds += weight * (took - self.seconds)
        self.count += 1


class Patience:
    def __init__(self) -> None:
        self._usual: dict[int, _Usual] = {}  # by the bits of the number of candidates
        self.late = 0  # answers in a row

    @property
    def is_slow(self) -> bool:
        return self.late >= LATE_ANSWERS

    def seconds(self, candidates: int, least: float, most: float) -> float:
        """That an answer for so many candidates may take, within these bounds."""
        usual = self._usual.get(candidates.bit_length())
        if usual is None or usual.count < FEW:
            return most
        return min(most, max(least, usual.seconds + DEVIATIONS * usual.deviation))

    def note(self, candidates: int, took: float, late: bool) -> None:
        """An answer has come, after so many seconds."""
        self.late = self.late + 1 if late else 0
        usual = self._usual.setdefault(candidates.bit_length(), _Usual())
        usual.note(took, LATE_WEIGHT if late and usual.count >= FEW else WEIGHT)

    def forget(self) -> None:
        """The server is another one, or was started anew."""
        self._usual, self.late = {}, 0

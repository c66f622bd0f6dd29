"""What no state of the server could answer. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from value_server.engine.errors import RequestError
from value_server.engine.job import Row


@dataclass(frozen=True)
class Limits:
    """Of one row. positions: of the model. slots: that one session can have. sees: whether the
    model does."""

    vocab_size: int
    candidates: int
    positions: int
    slots: int
    sees: bool = False

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse those that are beyond them."""
        everything = [ids for row in rows for ids in (row.tokens, row.candidates) if len(ids)]
        good = not everything or (
            min(map(min, everything)) >= 0 and max(map(max, everything)) < self.vocab_size
        )
        for row in rows:
            row.refused = self._fault(row, good)

    def _fault(self, row: Row, good_ids: bool) -> RequestError | None:
        if row.pictures and not self.sees:
            return RequestError("pictures: the value model reads text alone", "pictures")
        for field, ids in (("tokens", row.tokens), ("candidates", row.candidates)):
            if good_ids:
                break
            wrong = next((i for i in ids if not self._is_known(i)), None)
            if wrong is not None:
                what = f"id {wrong} is outside the vocabulary of {self.vocab_size}"
                return RequestError(f"{field}: {what}", field)
        if len(row.candidates) > self.candidates:
            field, what = "candidate_counts", f"{len(row.candidates)} candidates for one session"
            return RequestError(f"{field}: {what}, at most {self.candidates}", field)
        length = row.start + len(row.tokens)
        if row.lookahead_rank and not length:
            return RequestError("tokens: a text of none has no lookahead", "tokens")
        if length + bool(row.candidates) > self.positions:
            return RequestError(
                f"tokens: the text would be {length + bool(row.candidates)} tokens long with a "
                f"candidate, the model has {self.positions} positions",
                "tokens",
            )
        if length + len(row.candidates) > self.slots:
            return RequestError(
                f"tokens: the text would need {length + len(row.candidates)} slots with its "
                f"candidates, one session can have {self.slots}",
                "tokens",
            )
        return None

    def _is_known(self, token: int) -> bool:
        return 0 <= token < self.vocab_size

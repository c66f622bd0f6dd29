"""A round of other endings: one stream of several, each of which is known as soon as it ends."""

import asyncio
from collections.abc import Callable
from typing import Any

from lenvm_vllm.api.outcome import Outcome, Report
from lenvm_vllm.api.streams import Stream
from lenvm_vllm.api.texts import Text


class Round(Stream):
    """An ASGI `send` of it.

    take: is told the tokens and the outcome of each ending; whether it is good. With the first
    good one there is `enough`. valued: whether an ending had values.
    """

    def __init__(self, report: Report, take: Callable[[list[int], Outcome], bool]) -> None:
        super().__init__(_nowhere, report, wants_ids=True)
        self._take = take
        self.enough = asyncio.Event()
        self.valued = False

    @property
    def tokens(self) -> list[int]:
        """How many each ending has so far."""
        return [len(ids) for ids in self._ids.values()]

    async def _finish(self, text: Text) -> None:
        if self.enough.is_set():  # perhaps since nobody waits any more
            return
        outcome = self._report.outcome(text)
        self.valued |= outcome.step is not None and outcome.step.valued
        if self._take(text.ids or [], outcome):
            self.enough.set()


async def _nowhere(message: Any) -> None: ...

"""What the engine knows of each guided text, told to the API server of the same machine.

The engine steps in another process than the one that answers HTTP, and a logits processor has no
way to put a word into an answer. So each engine process keeps a table in a small file of the
folder that `metrics.FOLDER` names, a row a text, and the API server reads the row of an answer by
the key that it gave to the request. Nothing is asked of vLLM for it: no logprobs, which vLLM
computes in a function that wants a compiler.

A row holds the last RING steps of its text, for the API server may look a step late. Several
samples of one request have the same key: they are told apart by their last tokens.
"""

import contextlib
import logging
import os
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lenvm_vllm.telemetry.metrics import FOLDER, mapped

logger = logging.getLogger("vllm.lenvm")

KEY = "lenvm_key"  # in `vllm_xargs`: 32 hexadecimal digits
ROWS = 4096  # texts that an engine process knows, ended ones included, until they are replaced
RING = 64  # steps
FORCED, LANDING, VALUED, GAVE_WAY, UNSEEN = 1, 2, 4, 8, 16  # flags of a step

_KEY = re.compile("[0-9a-fA-F]{32}")
_PREFIX = "progress-"
_INTS, _FLOATS = [("index", "i4"), ("counted", "i8"), ("token", "i4")], ["p_end", "expected"]
# `counted` begins with `prefix_tokens`, any number of 31 bits: what a field cannot hold would end
# the engine.
_STEP = np.dtype([*_INTS, *((n, "f4") for n in _FLOATS), ("flags", "u1")])
_ROW = np.dtype(
    [("key", "u8", 2), ("steps", "i4"), ("steered", "i4"), ("ring", _STEP, RING)], align=True
)


@dataclass(frozen=True)
class Step:
    """What was known when one token of a text was sampled.

    counted: number of that token among those that the target is about.
    p_end: the unguided model's probability of an end there, NaN where no end was allowed.
    expected: tokens still to come behind that token, NaN where there were no values.
    forced: whether a rail made it the end. landing: whether the target raised ends there.
    valued: whether the values were there when they were last asked for.
    gave_way: whether a grammar kept the end from its rail.
    unseen: whether the prompt has pictures, sound or video that the value model does not see.
    steps, steered: steps of the text up to this token, and those that values steered.
    """

    counted: int
    p_end: float
    expected: float
    forced: bool
    landing: bool
    valued: bool
    gave_way: bool
    unseen: bool
    steps: int
    steered: int


class Progress:
    """The engine's side. Without a folder that takes its file nothing is told."""

    def __init__(self) -> None:
        self._table: NDArray[Any] | None = None
        self._free = deque(range(ROWS))
        if not (folder := os.environ.get(FOLDER)):
            return
        try:
            path = Path(folder) / f"{_PREFIX}{os.getpid()}"
            self._table = mapped(path, _ROW, ROWS)
        except OSError as error:
            logger.warning(
                "%s: cannot be written (%s); length_result lacks end, forced and steps",
                FOLDER,
                error,
            )

    def open(self, key: Any) -> int | None:
        """A row for a text; None where its API server did not ask for one, or none is free."""
        if self._table is None or not self._free or (halves := _halves(key)) is None:
            return None
        row = self._free.popleft()
        self._table["key"][row] = 0  # while the rest is that of another
        self._table["ring"]["index"][row] = -1
        self._table["steps"][row] = self._table["steered"][row] = 0
        self._table["key"][row] = halves
        return row

    def close(self, row: int | None) -> None:
        """The text has ended; its row stays until all others have been used."""
        if row is not None:
            self._free.append(row)

    def tell(
        self,
        rows: Sequence[int],
        index: Sequence[int],
        steps: Sequence[int],
        steered: Sequence[int],
        **step: Sequence[float],
    ) -> None:
        """A step of the texts in `rows`.

        index: of the token that is sampled now, from 0: tokens of the completion so far.
        step: all other fields of `_STEP`, as in `Step`; token: the last one so far, -1 where it is
        not known yet.
        """
        if self._table is None or not rows:
            return
        at, place = np.array(rows), np.array(index) % RING
        ring = self._table["ring"]
        ring["index"][at, place] = -1  # while the rest is written
        for name, values in step.items():
            ring[name][at, place] = values
        self._table["steps"][at] = steps
        self._table["steered"][at] = steered
        ring["index"][at, place] = index


class Known:
    """The API server's side: all engine processes that write into the folder."""

    def __init__(self) -> None:
        self._tables: dict[Path, NDArray[Any]] = {}

    def step(self, key: str, ids: Sequence[int] | None, count: int | None) -> Step | None:
        """What was known when the last of `count` tokens was sampled; None where nobody tells.

        ids: those tokens, by which samples with one key are told apart; None: not known.
        count: None: not known, the last step counts.
        """
        if (halves := _halves(key)) is None:
            return None
        for table in self._all():
            keys = table["key"]
            for row in np.flatnonzero((keys[:, 0] == halves[0]) & (keys[:, 1] == halves[1])):
                if (step := _step_of(table[row], ids, count)) is not None:
                    return step
        return None

    def _all(self) -> list[NDArray[Any]]:
        folder = os.environ.get(FOLDER)
        with contextlib.suppress(OSError):  # a folder that somebody cleared away
            for path in Path(folder).glob(f"{_PREFIX}*") if folder else ():
                if path not in self._tables and path.stat().st_size == ROWS * _ROW.itemsize:
                    self._tables[path] = np.memmap(path, _ROW, "r", shape=ROWS)
        return list(self._tables.values())


def _step_of(row: Any, ids: Sequence[int] | None, count: int | None) -> Step | None:
    if count is None:
        count = int(row["ring"]["index"].max()) + 1
    step = row["ring"][(count - 1) % RING]
    if count < 1 or step["index"] != count - 1 or not _is_of(row["ring"], ids):
        return None
    flags = int(step["flags"])
    # Of a sample that began alike and is longer, or behind the end.
    beyond = int((row["ring"]["index"] >= count).sum())
    steps = int(row["steps"]) - beyond
    return Step(
        counted=int(step["counted"]),
        p_end=float(step["p_end"]),
        expected=float(step["expected"]),
        forced=bool(flags & FORCED),
        landing=bool(flags & LANDING),
        valued=bool(flags & VALUED),
        gave_way=bool(flags & GAVE_WAY),
        unseen=bool(flags & UNSEEN),
        steps=steps,
        steered=min(int(row["steered"]), steps),
    )


def _is_of(ring: Any, ids: Sequence[int] | None) -> bool:
    """Whether the tokens that the ring saw before its steps are those of this text, if known."""
    ids = ids or ()
    for index in range(max(1, len(ids) - RING // 2), len(ids)):
        step = ring[index % RING]
        if step["index"] == index and step["token"] not in (-1, ids[index - 1]):
            return False
    return True


def _halves(key: Any) -> tuple[int, int] | None:
    """A key as two numbers; None for what is none."""
    # A client can name one where no API server does; what `int` reads besides digits, as a sign,
    # the table cannot hold.
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        return None
    return int(key[:16], 16), int(key[16:], 16)

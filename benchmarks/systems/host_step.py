"""What does a step of the value server cost beside its arithmetic?

    python -m benchmarks.systems.host_step

From the bytes of the message to those of the reply: decoding, the batcher and the engine in one
thread, without a socket. All is prepared as for a GPU, so Triton has to be there; a GPU does not.
The model is random and has one tiny layer, the attention is left out: `model` is no figure of any
real one, and not part of `host`. Each session has a text of its own and emits one new token a
step; with K = 0 it asks for what lookahead needs, else for K new candidates.

Milliseconds that the thread computes: what waits for a core is not counted. The last line is one
JSON object: of each number of sessions the median and the best of a step's `host`, and the mean of
each of its parts.
"""

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from unittest.mock import patch

import torch
from cyclopts import App, Parameter

from benchmarks.provenance import end
from benchmarks.systems.timing import Watch
from tests.support.tiny import tiny_lookahead
from trainer.output import table
from value_server.contract import wire
from value_server.engine.batcher import Batcher
from value_server.engine.engine import Engine
from value_server.engine.job import Job
from value_server.http.routes import reply_of, rows_of

app = App(help=__doc__, default_parameter=Parameter(consume_multiple=True))
CLIENT = "127.0.0.1 "
BUDGET_MS = 50.0
EMITTED = 7  # none of the candidates
FIRST_CANDIDATE = 100
RANK = 64  # of the lookahead head
# part → what does it, see Watch; `decode` and `encode` are beside them, `rest` is the batcher's own
PARTS = {
    "check": ("value_server.engine.engine.Engine.check",),
    "admit": ("value_server.engine.engine.Engine.admit",),
    "plan": ("value_server.engine.engine.next_pass",),
    "tables": (
        "value_server.engine.engine.written_by",
        "value_server.engine.engine.Engine._read_text",
    ),
    "model": ("value_server.engine.engine.Engine._heads_of",),
    "read": ("value_server.engine.engine.Engine.settle",),
    "answer": ("value_server.engine.job.Job.answer",),
    "release": ("value_server.engine.engine.Engine.release",),
}


class Steps:
    """Sessions of a value server that step for ever."""

    def __init__(self, sessions: int, length: int, candidates: int, steps: int) -> None:
        """length: of each text at first, in tokens."""
        self.watch = Watch(time.thread_time)
        ids = list(range(FIRST_CANDIDATE, FIRST_CANDIDATE + candidates))
        self._asked = wire.StepRequest(
            sessions=[f"chatcmpl-{i:032x}" for i in range(sessions)],
            starts=[length] * sessions,
            token_counts=[1] * sessions,
            tokens=wire.pack_ids([EMITTED] * sessions),
            candidate_counts=[candidates] * sessions,
            candidates=wire.pack_ids(ids * sessions),
            lookahead_rank=0 if candidates else RANK,
            budget_ms=BUDGET_MS,
        )
        most = length + steps + candidates
        self._batcher = Batcher(
            Engine(
                tiny_lookahead(RANK, layers=1, max_position=most + 1),
                slots=2 * sessions * most,
                max_sessions=2 * sessions,
                pass_tokens=sessions * (1 + candidates) + 64,
                attention="triton",
                graphs=True,
            )
        )
        cache = self._batcher.engine.cache
        for number, name in enumerate(self._asked.sessions):
            text = [number % 100, number // 100, *(place % 90 for place in range(length - 2))]
            session = cache.update(CLIENT + name, 0, text, ())
            assert session is not None
            for slot in session.path:  # as if it had been computed
                cache.ready[slot] = 1
            cache.unpin(session)

    def step(self) -> float:
        """Milliseconds of the host."""
        body = wire.encode(self._asked)
        self._asked.starts = [start + 1 for start in self._asked.starts]
        before = self._spent()
        with self.watch.part("decode"):
            message = wire.decode_request(body)
            job = Job(list(rows_of(message, CLIENT)), budget=BUDGET_MS / 1e3)
        with self.watch.part("rest"):
            self._batcher.submit(job)
            self._batcher.turn()
        result = job.future.result(0)
        with self.watch.part("encode"):
            wire.encode(reply_of(result, ""))
        if result.pending or result.refused:
            raise RuntimeError(f"{result.pending} rows without values, refused: {result.refused}")
        return 1e3 * (self._spent() - before)

    def _spent(self) -> float:
        seconds = self.watch.seconds
        return sum(seconds.values()) - seconds.get("model", 0.0)


@contextmanager
def no_attention() -> Iterator[None]:
    with patch(
        "value_server.engine.triton_attention.Tiles.attend",
        lambda self, query, keys, values, out, scaling, window: out.zero_(),
    ):
        yield


def measured(
    sessions: int, length: int, candidates: int, steps: int, warm: int
) -> dict[str, float]:
    """Milliseconds of a step."""
    run = Steps(sessions, length, candidates, warm + steps)
    with no_attention(), run.watch.over(PARTS), torch.inference_mode():
        for _ in range(warm):
            run.step()
        run.watch.seconds.clear()
        times = [run.step() for _ in range(steps)]
    parts = {part: 1e3 * seconds / steps for part, seconds in run.watch.seconds.items()}
    whole = {"host": statistics.median(times), "best": min(times)}
    names = ("decode", *PARTS, "rest", "encode")
    return {name: round(ms, 3) for name, ms in (whole | {n: parts[n] for n in names}).items()}


@app.default
def main(
    *,
    sessions: Sequence[int] = (1, 8, 32, 256),
    candidates: Sequence[int] = (0, 8),
    length: int = 512,
    steps: int = 100,
    warm: int = 10,
) -> None:
    """sessions, candidates: all combinations are measured. length: tokens of each text."""
    torch.set_num_threads(1)
    rows = [
        {"sessions": b, "candidates": k} | measured(b, length, k, steps, warm)
        for b, k in product(sessions, candidates)
    ]
    print(table(rows), file=sys.stderr)
    end({"host_ms": rows})


if __name__ == "__main__":
    app()

"""Does anything that a client can send break the value server, or make it grow?

    python -m benchmarks.systems.fuzz openapi --minutes 10
    python -m benchmarks.systems.fuzz step --minutes 10

A real server process with a tiny random model. `openapi` sends what schemathesis makes of its
OpenAPI description; `step` sends msgpack: noise, messages of wrong types, messages that contradict
themselves or ask too much, and good ones with some bits flipped.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
from cyclopts import App
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tqdm import tqdm

from lenvm_vllm.commands.processes import VALUE_SERVER, free_port, running
from tests.support.tiny import tiny_checkpoint
from value_server.contract import wire

app = App(help=__doc__)

VOCABULARY = 258
ALLOWED = {200, 400, 413, 422, 503}  # 503 is "busy": never a bug's 500

_names = st.sampled_from(["a", "b", "c"]) | st.text(max_size=20)
_ids = st.integers(0, VOCABULARY - 1) | st.integers(-(2**31), 2**31 - 1)
_anything: SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@st.composite
def _rows(draw: st.DrawFn, ids: SearchStrategy[int], consistent: bool) -> bytes:
    """A step request, whose counts fit its tokens if it is to be consistent."""
    names = draw(st.lists(_names, max_size=5, unique=consistent))
    tokens = [draw(st.lists(ids, max_size=30)) for _ in names]
    candidates = [draw(st.lists(ids, max_size=20)) for _ in names]
    wrong = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6)
    counts = [[len(row) for row in rows] for rows in (tokens, candidates)]
    request = wire.StepRequest(
        sessions=names,
        starts=[draw(st.just(0) | st.integers(0, 40) | st.integers(0, 2**63 - 1)) for _ in names],
        token_counts=counts[0] if consistent else draw(wrong),
        tokens=wire.pack_ids([token for row in tokens for token in row]),
        candidate_counts=counts[1] if consistent else draw(wrong),
        candidates=wire.pack_ids([token for row in candidates for token in row]),
        closed=draw(st.lists(_names, max_size=3)),
    )
    return wire.encode(request)


@st.composite
def _of_wrong_types(draw: st.DrawFn) -> bytes:
    fields = [field.name for field in msgspec.structs.fields(wire.StepRequest)]
    return msgspec.msgpack.encode(draw(st.dictionaries(st.sampled_from(fields), _anything)))


@st.composite
def _flipped(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(_rows(_ids, consistent=True)))
    for place in draw(st.lists(st.integers(0, len(data) - 1), max_size=5)):
        data[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(data[: draw(st.integers(0, len(data)))])


step_bodies: SearchStrategy[bytes] = st.one_of(
    st.binary(max_size=300),
    _anything.map(msgspec.msgpack.encode),
    _of_wrong_types(),
    _rows(_ids, consistent=False),
    _rows(_ids, consistent=True),
    _rows(st.integers(0, VOCABULARY - 1), consistent=True),
    _flipped(),
)


def check_step(client: httpx.Client, body: bytes) -> int:
    """Send a body; the status. Raises AssertionError for an answer that is none."""
    reply = client.post(wire.STEP_PATH, content=body)
    assert reply.status_code in ALLOWED, (reply.status_code, reply.text, body)
    if reply.status_code == 200:
        candidates = wire.unpack_ids(wire.decode_request(body).candidates)
        wire.decode_reply(reply.content, len(candidates))
    else:
        assert reply.json()["error"]["message"]
    return reply.status_code


def describe(url: str, examples: int, number: int) -> subprocess.CompletedProcess[str]:
    """Everything that schemathesis makes of the server's description, by the seed `number`."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color"),
        *("--checks", "not_a_server_error", "--max-examples", str(examples)),
        *("--seed", str(number), "--generation-database", "none"),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def server() -> Iterator[tuple[str, psutil.Process, Path]]:
    """URL, process and log of a value server with a pool that is soon full."""
    with tempfile.TemporaryDirectory() as name:
        folder, url = Path(name), f"http://127.0.0.1:{(port := free_port())}"
        command = [
            *(*VALUE_SERVER, str(tiny_checkpoint(folder / "model")), "--port", str(port)),
            *("--dtype", "float32", "--threads", "1", "--slots", "2000", "--max-sessions", "32"),
        ]
        with running(command, f"{url}/ready", folder / "log") as child:
            yield url, psutil.Process(child.pid), folder / "log"


class Watch:
    """A progress bar over time, and the server's memory along it."""

    def __init__(self, process: psutil.Process, minutes: float) -> None:
        self.process = process
        self.rss_mb: list[float] = []
        self._end = time.monotonic() + 60 * minutes
        self._bar = tqdm(total=round(60 * minutes), unit="s", file=sys.stderr)

    def goes_on(self) -> bool:
        self.rss_mb.append(self.process.memory_info().rss / 2**20)
        left = self._end - time.monotonic()
        self._bar.update(round(self._bar.total - left) - self._bar.n)
        return left > 0

    def result(self) -> dict[str, Any]:
        """alive: whether the server still runs. Memory after a tenth of the time and at the end."""
        self._bar.close()
        return {
            "alive": self.process.is_running(),
            "rss_mb_after_10_percent": round(self.rss_mb[len(self.rss_mb) // 10], 1),
            "rss_mb_at_end": round(self.rss_mb[-1], 1),
        }


@app.command
def step(*, minutes: float = 10.0) -> None:
    """Fuzz the binary endpoint; the last line is JSON.

    Parameters
    ----------
    minutes
        How long.
    """
    statuses: Counter[int] = Counter()
    with server() as (url, process, log), httpx.Client(base_url=url, timeout=60) as client:
        watch = Watch(process, minutes)
        turn = 0
        while watch.goes_on():

            @seed(turn)
            @settings(
                max_examples=200,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(step_bodies)
            def send(body: bytes) -> None:
                statuses[check_step(client, body)] += 1

            send()
            turn += 1
        tracebacks = log.read_text().count("Traceback")
        counts = {str(status): count for status, count in sorted(statuses.items())}
        result = {"requests": statuses.total(), "statuses": counts, "server_errors": statuses[500]}
        print(json.dumps(result | {"tracebacks": tracebacks} | watch.result()))


@app.command
def openapi(*, minutes: float = 10.0) -> None:
    """Fuzz everything that the OpenAPI description tells; the last line is JSON.

    Parameters
    ----------
    minutes
        How long.
    """
    with server() as (url, process, log):
        watch = Watch(process, minutes)
        turn = failed = 0
        while watch.goes_on():
            run = describe(url, examples=100, number=turn)
            turn += 1
            if run.returncode:
                failed += 1
                print(run.stdout[-4000:], run.stderr[-2000:], file=sys.stderr)
        tracebacks = log.read_text().count("Traceback")
        result = {"runs": turn, "failed_runs": failed, "tracebacks": tracebacks}
        print(json.dumps(result | watch.result()))


if __name__ == "__main__":
    app()

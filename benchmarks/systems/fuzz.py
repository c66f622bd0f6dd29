"""Does anything that a client can send break the value server, or make it grow?

    python -m benchmarks.systems.fuzz openapi --minutes 10
    python -m benchmarks.systems.fuzz step --minutes 10

A real server process with a tiny random model. `openapi` sends what schemathesis makes of its
OpenAPI description; `step` sends msgpack: noise, messages of wrong types, messages that contradict
themselves or ask too much, and good ones with some bits flipped.
"""

import subprocess
import sys
from collections import Counter
from contextlib import AbstractContextManager
from typing import Any

import httpx
import msgspec
from cyclopts import App
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from benchmarks.provenance import end
from benchmarks.systems.steps import step_request
from benchmarks.systems.watch import Watch, tiny_value_server
from lenvm_vllm.commands.processes import Server
from value_server.contract import wire
from value_server.engine.job import Row

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
    starts = st.just(0) | st.integers(0, 40) | st.integers(0, 2**63 - 1)
    tokens, candidates = st.lists(ids, max_size=30), st.lists(ids, max_size=20)
    names = draw(st.lists(_names, max_size=5, unique=consistent))
    rows = [Row(name, draw(starts), draw(tokens), draw(candidates)) for name in names]
    request = step_request(rows, draw(st.lists(_names, max_size=3)))
    request.lookahead_rank = draw(st.just(0) | st.integers(-(2**63), 2**63 - 1))
    request.budget_ms = draw(st.none() | st.sampled_from([0.0, 0.01, 50.0]) | st.floats())
    if not consistent:
        wrong = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6)
        request.token_counts, request.candidate_counts = draw(wrong), draw(wrong)
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
        wire.decode_reply(reply.content, wire.decode_request(body))
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


def server() -> AbstractContextManager[Server]:
    """A value server with a pool that is soon full."""
    return tiny_value_server("--slots", 2000, "--max-sessions", 32)


def state(server: Server, watch: Watch) -> dict[str, Any]:
    """Whether it still runs, what its log says of bugs, and its memory."""
    tracebacks = server.log.read_text().count("Traceback")
    return {"tracebacks": tracebacks, "alive": server.process.poll() is None, **watch.memory()}


@app.command
def step(*, minutes: float = 10.0) -> None:
    """Fuzz the binary endpoint for so long; the last line is JSON."""
    statuses: Counter[int] = Counter()
    with server() as serving, httpx.Client(base_url=serving.url, timeout=60) as client:
        watch = Watch(serving, minutes)
        turn = 0
        while watch.goes_on():
            turn += 1

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
        counts = {str(status): count for status, count in sorted(statuses.items())}
        result = {"requests": statuses.total(), "statuses": counts, "server_errors": statuses[500]}
        end(result | state(serving, watch))


@app.command
def openapi(*, minutes: float = 10.0) -> None:
    """Fuzz everything that the OpenAPI description tells for so long; the last line is JSON."""
    with server() as serving:
        watch = Watch(serving, minutes)
        turn = failed = 0
        while watch.goes_on():
            run = describe(serving.url, examples=100, number=turn)
            turn += 1
            if run.returncode:
                failed += 1
                print(run.stdout[-4000:], run.stderr[-2000:], file=sys.stderr)
        end({"runs": turn, "failed_runs": failed} | state(serving, watch))


if __name__ == "__main__":
    app()

"""The faults: each a context manager that goes on as long as its block, and what it is held to."""

import contextlib
import itertools
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from benchmarks.systems.disturb import meanwhile, paused
from benchmarks.systems.stage import Stage
from benchmarks.systems.steps import Sessions, step_request
from benchmarks.systems.streams import PATIENCE_S, Wish
from lenvm_vllm.commands.demo import MODEL, NAME
from lenvm_vllm.commands.processes import Server
from lenvm_vllm.target.misplaced import FIELD
from value_server.contract import wire
from value_server.engine.job import Row

Disturb = Callable[[Stage], AbstractContextManager[None]]

VOCABULARY = range(1000, 40_000)  # ids of ordinary tokens
# A text has some 40 tokens of prompt, 60 to 100 of its own and up to 15 candidates.
SLOTS_NEEDED = 120
SMALL = 2048  # slots of a server that is easily filled
SESSIONS = 8  # of a server that is asked for more
STEP_S = 0.1  # of another engine
PAUSE_S = 3.0  # of a server that is stopped
LONG = 6000  # tokens
LONG_S = 6.0  # from one long prompt to the next
RARE = " Kyrgyz"  # one token, which no other text here has


def lag(seconds: float) -> Disturb:
    """Each answer of the value server comes so much later."""
    return lambda stage: stage.proxy.spoilt("lag", seconds)


@contextmanager
def gone(stage: Stage, how: signal.Signals) -> Iterator[None]:
    """The value server ends by this signal, and is started anew behind the block."""
    stage.values.signal(how)
    yield
    with stage.aside():
        stage.values.stop()
        stage.values.start()


def stopped(stage: Stage) -> AbstractContextManager[None]:
    """Awake for PAUSE_S, then stopped as long, again and again."""

    def turn() -> None:
        time.sleep(PAUSE_S)
        with paused(stage.values):
            time.sleep(PAUSE_S)

    return meanwhile(turn)


def starved(server: Server) -> AbstractContextManager[None]:
    """A twentieth of the time."""

    def turn() -> None:
        with paused(server):
            time.sleep(0.095)
        time.sleep(0.005)

    return meanwhile(turn)


@contextmanager
def restarted(stage: Stage) -> Iterator[None]:
    with stage.aside():
        stage.restart_vllm()
    yield


@contextmanager
def filled(stage: Stage) -> Iterator[None]:
    """Others want as many slots as there are, again and again."""
    draw, numbers = random.Random(0), itertools.count()
    with stage.replaced(slots=SMALL), _client(stage.values) as http:

        def turn() -> None:
            texts = [draw.choices(VOCABULARY, k=400) for _ in range(SMALL // 400)]
            rows = [Row(f"other-{next(numbers)}", 0, text) for text in texts]
            http.post(wire.STEP_PATH, content=wire.encode(step_request(rows)))

        with meanwhile(turn):
            yield


@contextmanager
def halved(stage: Stage) -> Iterator[None]:
    """Half the slots that the guided texts of the load need."""
    with stage.replaced(slots=SLOTS_NEEDED * stage.clients // 2):
        yield


class Engine:
    """Another one with texts of its own, which grow by a token each step; a long one is over, and
    a new one begins."""

    def __init__(self, http: httpx.Client, texts: int) -> None:
        self._http, self._draw = http, random.Random(0)
        self._names = (f"engine-{number}" for number in itertools.count())
        self._sessions = Sessions()
        for _ in range(texts):
            self._open()

    def turn(self) -> None:
        """A step, and the time until the next."""
        texts = self._sessions.texts
        over = [name for name, text in texts.items() if len(text) > SLOTS_NEEDED]
        for name in over:
            self._sessions.close(name)
            self._open()
        for text in texts.values():
            text += self._tokens(1)
        with contextlib.suppress(httpx.HTTPError):  # it goes on without an answer
            self._sessions.ask(self, {name: self._tokens(4) for name in texts}, over)
        time.sleep(STEP_S)

    def step(self, request: wire.StepRequest) -> wire.StepReply:
        """As the plugin asks."""
        request = msgspec.structs.replace(request, budget_ms=1e3 * STEP_S)
        reply = self._http.post(wire.STEP_PATH, content=wire.encode(request)).raise_for_status()
        return wire.decode_reply(reply.content, request)

    def _open(self) -> None:
        self._sessions.open(next(self._names), self._tokens(self._draw.randrange(40, SLOTS_NEEDED)))

    def _tokens(self, count: int) -> list[int]:
        return self._draw.choices(VOCABULARY, k=count)


@contextmanager
def crowded(stage: Stage) -> Iterator[None]:
    """Another engine steps twice as many sessions as the value server takes."""
    with (
        stage.replaced("--max-sessions", SESSIONS),
        _client(stage.values) as http,
        meanwhile(Engine(http, 2 * SESSIONS).turn),
    ):
        yield


def long_prompts(wish: Wish | None) -> Disturb:
    """A prompt of LONG tokens every LONG_S, guided or not; who is not answered by then leaves."""

    @contextmanager
    def disturb(stage: Stage) -> Iterator[None]:
        draw = random.Random(str(wish))
        body = {"model": NAME, "max_tokens": 16} | ({FIELD: wish} if wish else {})
        with _client(stage.vllm, LONG_S) as http:

            def turn() -> None:
                end = time.monotonic() + LONG_S
                with contextlib.suppress(httpx.ReadTimeout):
                    http.post(
                        "/v1/completions", json={**body, "prompt": draw.choices(VOCABULARY, k=LONG)}
                    )
                time.sleep(max(0.0, end - time.monotonic()))

            with meanwhile(turn):
                yield

    return disturb


def one_more(stage: Stage) -> AbstractContextManager[None]:
    """One guided request more at a time, whose prompt has the token RARE."""
    content = f"Write about the history of the{RARE} people."

    def turn() -> None:
        with stage.load.client() as http:
            stage.load.ask(http, content, {"tokens": 60}, extra=True)

    return meanwhile(turn)


@contextmanager
def poisoned(stage: Stage) -> Iterator[None]:
    """The values of that token, and of all behind it, are NaN."""
    with stage.aside():
        model = _with_nan(stage.folder / "nan")
    with stage.replaced(model=model), one_more(stage):
        yield


def _with_nan(folder: Path) -> Path:
    """A copy of the backbone in which the embedding of RARE is NaN; made once."""
    if folder.exists():
        return folder
    (token,) = AutoTokenizer.from_pretrained(MODEL).encode(RARE)
    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _client(server: Server, timeout_s: float = PATIENCE_S) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=timeout_s)


@dataclass(frozen=True)
class Fault:
    """hold: how long, as a share of the usual. timed: whether it is held to latencies.

    beside: what the load has beside it in the healthy time that it is compared with.
    """

    disturb: Disturb
    hold: float = 1.0
    timed: bool = True
    beside: Disturb | None = None


FAULTS: dict[str, Fault] = {
    "killed": Fault(lambda stage: gone(stage, signal.SIGKILL)),
    "paused": Fault(stopped),
    "corrupt": Fault(lambda stage: stage.proxy.spoilt("corrupt")),
    "5 ms": Fault(lag(0.005)),
    "50 ms": Fault(lag(0.05)),
    "500 ms": Fault(lag(0.5)),
    "late": Fault(lag(3.0)),
    "restarted": Fault(lambda stage: gone(stage, signal.SIGTERM)),
    "cut": Fault(lambda stage: stage.proxy.spoilt("cut")),
    "trickle": Fault(lambda stage: stage.proxy.spoilt("trickle")),
    "starved": Fault(lambda stage: starved(stage.values)),
    "filled": Fault(filled),
    "half the slots": Fault(halved),
    "twice the sessions": Fault(crowded),
    "a row of NaN": Fault(poisoned, beside=one_more),
    "long prompts": Fault(long_prompts({"tokens": 12}), 1.5, beside=long_prompts(None)),
    "vllm restarted": Fault(restarted, 0.0, timed=False),
}

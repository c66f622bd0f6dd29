"""A toy language with perfect values, for the guide and all above it.

Legend: B guided rows, V vocabulary. Token 0 is the end; token x says that x more tokens are to
come, which makes a perfect value model easy: the length of candidate x is x.
"""

import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import wait
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from lenvm_vllm.engine.guide import Guide
from lenvm_vllm.engine.messages import Question
from lenvm_vllm.engine.pace import Pace
from lenvm_vllm.engine.sessions import Sessions
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.settings import Settings
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.values.lookahead import Keys
from lenvm_vllm.values.replicas import Replicas
from tests.support.fakes import keys_of, queries_of, replicas_of
from value_server.contract import wire
from value_server.contract.values import logit_from_length

V = 400
EOS = 0
GAMMA = 0.99
NO_LIMIT = 1e6
SECONDS = 120.0  # longer than anything here takes
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377)


INFO = wire.ModelInfo(
    gamma=GAMMA,
    base_model="toy",
    tokenizer_fingerprint="f" * 64,
    vocab_size=V,
    max_position=1000,
    max_sessions=100,
    max_candidates=64,
)


class Server:
    """Keeps texts as the real server does and knows the length of every candidate.

    failures: raised by the next steps, None for one that works. unheld: sessions that it has no
    room for. refused: sessions that never get values, and why. pending: rows that have none in
    time. gate: no step is answered while it is shut. by_text: z depends on the text, too, so that
    rows that are mixed up are seen. key_failures: raised by the next askers of the keys.
    """

    rests = False

    def __init__(self, by_text: bool = False, **info: Any) -> None:
        self.by_text = by_text
        self.info = msgspec.structs.replace(INFO, **info)
        self.texts: dict[str, list[int]] = {}
        self.requests: list[wire.StepRequest] = []
        self.closed: list[str] = []
        self.failures: list[Exception | None] = []
        self.key_failures: list[Exception] = []
        self.unheld: set[str] = set()
        self.refused: dict[str, str] = {}
        self.pending: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fingerprint: str | None = None

    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
        self.fingerprint = fingerprint()
        return self.info

    def keys(self, info: wire.ModelInfo) -> Keys:
        if self.key_failures:
            raise self.key_failures.pop(0)
        return keys_of(info)

    def step(self, request: wire.StepRequest) -> wire.StepReply:
        request = wire.decode_request(wire.encode(request))
        self.requests.append(request)
        assert self.gate.wait(SECONDS)
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        self.closed += request.closed
        for session in request.closed:
            self.texts.pop(session, None)
        lost = [row for row, tell in enumerate(told(request)) if not self.take(*tell)]
        lengths = wire.unpack_ids(request.candidates).astype(np.float64)
        z = logit_from_length(torch.from_numpy(lengths), self.info.gamma).float().numpy()
        owner = np.repeat(np.arange(len(request.sessions)), request.candidate_counts)
        names = request.sessions
        refused = {row: self.refused[s] for row, s in enumerate(names) if s in self.refused}
        biases = np.array([self.bias(session) for session in names])
        biases[[*lost, *refused, *(row for row in self.pending if row < len(names))]] = np.nan
        z += biases[owner].astype(np.float32)
        held = [len(self.texts.get(session, [])) for session in names]
        queries = queries_of(biases.tolist()) if request.lookahead_rank else b""
        assert request.lookahead_rank in (0, self.info.lookahead_rank)
        return wire.StepReply(
            logits=wire.pack_logits(z), queries=queries, held=held, refused=refused
        )

    def bias(self, session: str) -> float:
        """What its text adds to the logits of all next tokens."""
        return self.bias_of(self.texts.get(session, []))

    def bias_of(self, text: list[int]) -> float:
        return sum(text) % 11 / 10 if self.by_text else 0.0

    def take(self, session: str, start: int, tokens: list[int]) -> bool:
        if session in self.unheld or start > len(self.texts.get(session, [])):
            return False
        self.texts[session] = self.texts.get(session, [])[:start] + tokens
        return True


def looking(**info: Any) -> Server:
    """One that has lookahead."""
    return Server(by_text=True, lookahead_rank=2, **info)


def told(request: wire.StepRequest) -> list[tuple[str, int, list[int]]]:
    """(session, start, tokens) of each row."""
    tokens = iter(wire.unpack_ids(request.tokens).tolist())
    return [
        (session, start, [next(tokens) for _ in range(count)])
        for session, start, count in zip(
            request.sessions, request.starts, request.token_counts, strict=True
        )
    ]


def asked(request: wire.StepRequest) -> list[list[int]]:
    """The candidates of each row."""
    ids = iter(wire.unpack_ids(request.candidates).tolist())
    return [[next(ids) for _ in range(count)] for count in request.candidate_counts]


def sessions_of(client: Any) -> Sessions:
    """client: a server, or `Replicas`."""
    replicas = client if isinstance(client, Replicas) else replicas_of(client)
    return Sessions(replicas, lambda: "ours", Counters())


def guide_of(client: Any, sentences: Any = None, **fields: Any) -> Guide:
    """client: as of `sessions_of`."""
    settings = Settings(**{"wait_floor_s": SECONDS, "timeout_s": SECONDS} | fields)
    return Guide(sessions_of(client), settings, Counters(), sentences)


def values(sessions: Sessions, states: Sequence[RequestState], wait_s: float = SECONDS) -> Tensor:
    """(B, 4) value logits of one step that waits so long, NaN in rows without."""
    renew(states)
    info = sessions.model(time.perf_counter() + wait_s)
    tokens = torch.tensor([[10, 20, 40, 80]]).expand(len(states), -1)
    none = torch.zeros(len(states), dtype=torch.bool)
    question = Question(sessions.askable(states, info), tokens, tokens > 0, none)
    return sessions.values(states, question, Pace(0.0, wait_s, wait_s))


def valued(sessions: Sessions, states: Sequence[RequestState], wait_s: float = SECONDS) -> Any:
    """Whether each has values in a step; see `values`."""
    return (~values(sessions, states, wait_s).isnan()).all(-1).tolist()


def tell(sessions: Sessions, states: Sequence[RequestState], step_s: float = 0.0) -> None:
    """Before a step of vLLM's that takes so long; 0: it is not known yet."""
    pace = Pace(0.0, SECONDS, SECONDS)
    pace.step_s = step_s
    renew(states)
    sessions.tell(states, pace)


def settle(sessions: Sessions) -> None:
    """Until every message is answered."""
    wait([sent.call.answer for sent in sessions._out], SECONDS)


def request(
    target: Any = 30, prompt: list[int] | None = None, output: Any = (), **fields: Any
) -> RequestState:
    """A request without rails."""
    wanted = {"tokens": target} if isinstance(target, int) else target
    wanted = {"tolerance": None} | wanted
    return RequestState(
        target=LengthTarget.parse(wanted),
        prompt_ids=[7, 50] if prompt is None else prompt,
        output_ids=list(output),
        **({"eos_ids": [EOS]} | fields),
    )


def renew(states: Iterable[RequestState]) -> None:
    """As `EngineRows` does at the beginning of each step."""
    for state in states:
        state.renew()


def flat_logits(rows: int, tokens: Any = (EOS, 10, 20, 40, 80)) -> Tensor:
    logits = torch.full((rows, V), -math.inf)
    logits[:, list(tokens)] = 0.0
    return logits


def steered(guide: Guide, logits: Tensor, states: dict[int, RequestState]) -> Tensor:
    logits = logits.clone()
    renew(states.values())
    if (writes := guide.plan(logits, states)) is not None:
        writes.apply_inplace(logits)
    return logits


def guided_rows(guide: Guide, logits: Tensor, states: dict[int, RequestState]) -> list[int]:
    """The rows that come out different, and by values."""
    after = steered(guide, logits, states)
    changed = (after != logits).any(-1)
    return [row for row in sorted(states) if states[row].valued and changed[row]]


def toy_logits(state: RequestState, rng: random.Random) -> Tensor:
    """(V,) The next token says mostly one less; it may change its mind, and end at any time."""
    wants = [*state.prompt_ids, *state.output_ids][-1]
    weights = {length: math.exp(rng.random()) for length in LENGTHS}
    weights[max(1, wants - 1)] = 20.0
    total = sum(weights.values())
    weights[EOS] = total * (19.0 if wants == 1 else 0.05)
    logits = torch.full((V,), -math.inf)
    logits[list(weights)] = torch.tensor(list(weights.values())).log()
    return logits * (state.temperature or 1.0)


def sample(logits: Tensor, temperature: float, rng: random.Random) -> int:
    """As vLLM does, `logits` (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    p = torch.softmax(logits.double() / temperature, dim=-1).tolist()
    return rng.choices(range(V), p)[0]

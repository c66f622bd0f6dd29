"""A load of streams, guided ones and unguided neighbours, and when each of their tokens came."""

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import regex

from benchmarks.systems.timing import wait_until
from lenvm_vllm.api.outcome import PROGRESS, RESULT
from lenvm_vllm.commands.demo import NAME
from lenvm_vllm.commands.demo.questions import PROMPTS
from lenvm_vllm.commands.processes import Server
from lenvm_vllm.target.misplaced import FIELD
from lenvm_vllm.target.rails import rails_of
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.text.sentences import ends_sentence

Wish = dict[str, Any]  # a length_target
Span = tuple[float, float]  # of time.perf_counter

WISHES: tuple[Wish, ...] = (
    {"tokens": 60, "tolerance": 0.0},
    {"tokens": 80},
    {"tokens": 100},
    {"mode": "at_most", "tokens": 70},
    {"mode": "at_least", "tokens": 70},
    {"mode": "range", "min_tokens": 70, "max_tokens": 90},
)
MAX_TOKENS = 120
PATIENCE_S = 180.0  # longer than anything here takes
LANDING = 10  # tokens at the end of a text, in most of which it is brought to its end

_ITEM = regex.compile(r"^\s*(?:[-*+•]|\(?(?:\d{1,3}|\p{L})[.)])\s+\S")


def ends_whole(text: str, natural: bool) -> bool:
    """Whether it stops behind a sentence, a code block or an item of a list.

    natural: whether the model itself might have ended here, as `length_result` tells. An item has
    no mark at its end: it is whole where the model ends it, or behind its line.
    """
    if ends_sentence(text):
        return True
    lines = text.rstrip().split("\n")
    return bool(_ITEM.match(lines[-1])) and (natural or text.rstrip(" \t").endswith("\n"))


@dataclass
class Answer:
    """What came of a request. wish: None of an unguided one. extra: it belongs to a fault, and
    not to the load.

    valued: of each token of a guided one, the last excepted, when it came and whether its step had
    values. reason: why it ended; None of one that was lost.
    """

    wish: Wish | None
    extra: bool = False
    ended: float = 0.0
    text: str = ""
    tokens: int = 0
    reason: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    valued: list[tuple[float, bool]] = field(default_factory=list)

    @property
    def inside(self) -> bool:
        """Whether its rails were kept; of an unguided or a lost one too."""
        if self.wish is None or self.reason is None:
            return True
        rails = rails_of(LengthTarget.parse(self.wish))
        return rails.first <= self.tokens <= (rails.last or MAX_TOKENS)

    @property
    def choosy(self) -> bool:
        """Whether it is guided and had a choice of places to end."""
        exact = self.wish is not None and self.wish.get("tolerance") == 0.0
        return bool(self.valued) and self.reason is not None and not exact

    @property
    def blind(self) -> bool:
        """Whether it was brought to its end without values."""
        landing = [known for _, known in self.valued[-LANDING:]]
        return sum(landing) < len(landing) / 2

    @property
    def whole(self) -> bool:
        return ends_whole(self.text, self.result.get("end") == "natural")


class Load:
    """Requests to a vLLM, each client's one after the other, and what became of all of them.

    model: as it is served. gaps: the times between two tokens of a stream, of guided streams and of
    unguided ones.
    """

    def __init__(self, vllm: Server, model: str = NAME) -> None:
        self.gaps: dict[bool, list[Span]] = {True: [], False: []}
        self.answers: list[Answer] = []
        self.counts: Counter[str] = Counter()
        self._vllm = vllm
        self._model = model
        self._stop = threading.Event()

    @contextlib.contextmanager
    def running(self, clients: int, guided: bool = True) -> Iterator[None]:
        """So many guided and as many unguided clients, or twice as many unguided ones. Raises what
        one of them raises."""
        with ThreadPoolExecutor(2 * clients) as threads:
            kinds = [guided and i % 2 == 0 for i in range(2 * clients)]
            work = [threads.submit(self._run, i, kind) for i, kind in enumerate(kinds)]
            try:
                yield
            finally:
                self._stop.set()
            for one in work:
                one.result()

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self._vllm.url, timeout=PATIENCE_S)

    def _run(self, seed: int, guided: bool) -> None:
        draw = random.Random(seed)
        with self.client() as http:
            while not self._stop.is_set():
                content = f"{draw.choice(PROMPTS)} ({draw.randrange(10**6)})"
                wish = draw.choice(WISHES) if guided else None
                self.ask(http, content, wish)

    def ask(self, http: httpx.Client, content: str, wish: Wish | None, extra: bool = False) -> None:
        """One that fails without a restart of vLLM is lost; else it is asked again.

        extra: as of `Answer`; its tokens are not timed.
        """
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,  # else a token without text of its own would send nothing
            "temperature": 1.0,
            "top_k": 15,
            "max_tokens": MAX_TOKENS,
        }
        if wish is not None:
            body[FIELD] = {**wish, "progress": 1, "endings": 1}
        while True:
            wait_until(lambda: self._vllm.up, PATIENCE_S)
            process, answer = self._vllm.process, Answer(wish, extra)
            with contextlib.suppress(httpx.HTTPError):
                self._read(http, body, answer)
            if answer.reason or (self._vllm.up and self._vllm.process is process):
                break
            self.counts["resent"] += 1
        answer.ended = time.perf_counter()
        self.answers.append(answer)

    def _read(self, http: httpx.Client, body: dict[str, Any], answer: Answer) -> None:
        """The stream into `answer`."""
        gaps, last = self.gaps[answer.wish is not None], None
        with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            for line in reply.iter_lines():
                now = time.perf_counter()
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                answer.tokens = (chunk.get("usage") or {}).get("completion_tokens", 0)
                for choice in chunk.get("choices", ()):
                    if choice.get("token_ids"):
                        if last is not None and not answer.extra:
                            gaps.append((last, now))
                        last = now
                    _follow(answer, choice, now)


def _follow(answer: Answer, choice: dict[str, Any], now: float) -> None:
    answer.text += choice["delta"].get("content") or ""
    answer.reason = choice.get("finish_reason") or answer.reason
    answer.result = choice.get(RESULT) or answer.result
    if progress := choice.get(PROGRESS):
        answer.valued.append((now, progress["expected"] is not None))

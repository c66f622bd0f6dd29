"""Chat requests to vLLM, one or many, and how many of them went wrong."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.containers.shell import say

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "Explain in simple words how a bicycle stays upright."
LONGEST_S = 120
RUNNING = "vllm:num_requests_running"


@dataclass
class Tally:
    """Requests sent, and what was wrong with those that failed and with other checks."""

    requests: int = 0
    failed: int = 0
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, right: bool, what: str) -> None:
        """Note, and say, what is not as it should be."""
        if not right:
            say(f"WRONG: {what}")
            self.wrong.append(what)

    def count(self, right: bool, what: str) -> None:
        """The same of a request."""
        with self.lock:
            self.requests += 1
            self.failed += not right
        self.check(right, what)


@dataclass
class Client:
    """Of one vLLM."""

    url: str
    tally: Tally

    def length(self, target: Any, low: int, high: int, **others: Any) -> None:
        """An answer with low to high tokens."""
        status, answer = self._post({"length_target": target} | others)
        tokens = answer.get("usage", {}).get("completion_tokens", -1) if status == 200 else -1
        whole = bool(status == 200 and answer["choices"][0]["message"]["content"])
        seen = f"{target} {others or ''}: status {status}, {tokens} tokens"
        self.tally.count(whole and low <= tokens <= high, seen)

    def refused(self, target: Any, name: str) -> None:
        """A 400 that names the field."""
        status, answer = self._post({"length_target": target})
        self.tally.count(status == 400 and name in json.dumps(answer), f"{target}: status {status}")

    def streamed(self, target: Any, low: int, high: int) -> None:
        """A stream that ends, with low to high tokens by its last chunk's count."""
        pieces, tokens = 0, -1
        try:
            for chunk in self._chunks(target):
                pieces += any(choice["delta"].get("content") for choice in chunk["choices"])
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        except (httpx.HTTPError, ValueError) as error:
            self.tally.count(False, f"stream of {target}: {error!r}")
            return
        right = low <= tokens <= high and pieces > 1
        self.tally.count(right, f"stream of {target}: {tokens} tokens in {pieces} pieces")

    @contextmanager
    def load(self, count: int, tokens: int) -> Iterator[list["Future[None]"]]:
        """`count` requests at a time, in vLLM's engine when the block begins; then all answered."""
        low, high = round(tokens * 0.9), round(tokens * 1.1)
        with ThreadPoolExecutor(count) as pool:
            futures = [pool.submit(self.length, tokens, low, high) for _ in range(count)]
            limit = time.monotonic() + LONGEST_S
            while self._running() < count and time.monotonic() < limit:
                time.sleep(0.1)
            yield futures
        for future in futures:
            future.result()

    def _running(self) -> float:
        """Requests that vLLM computes, as it tells."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60, trust_env=False).text.splitlines()
        return sum(float(one.split()[-1]) for one in lines if one.startswith(RUNNING))

    def _post(self, fields: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status, 0 for none at all, and body."""
        try:
            reply = httpx.post(
                f"{self.url}/v1/chat/completions",
                json=_body(fields),
                timeout=LONGEST_S,
                trust_env=False,
            )
            answer: dict[str, Any] = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            say(f"no answer: {error!r}")
            return 0, {}
        return reply.status_code, answer

    def _chunks(self, target: Any) -> Iterator[dict[str, Any]]:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = _body({"length_target": target} | options)
        with httpx.stream(
            "POST",
            f"{self.url}/v1/chat/completions",
            json=body,
            timeout=LONGEST_S,
            trust_env=False,
        ) as reply:
            reply.raise_for_status()
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))


def _body(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]} | fields

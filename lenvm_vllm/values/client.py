# ruff: noqa: N818 - names as in the tree below
"""Client of one value server: a call, and its answer.

ValueServerError
├── Unreachable     no connection, or it broke
├── TimedOut        no answer in time
├── Refused         an HTTP status that is an error
├── BadReply        an answer that cannot be read
├── Mismatch        values of another tokenizer, protocol or model than it told of
└── CircuitOpen     failed a moment ago: not asked
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import msgspec

from lenvm_vllm.values.endpoint import http_client
from lenvm_vllm.values.traces import step_span
from value_server.contract import wire

if TYPE_CHECKING:
    from lenvm_vllm.values.lookahead import Keys

LARGEST_INFO = 1 << 16  # bytes
# Times the time-out, in which all keys of a lookahead head have to be there; no step waits.
KEYS_TIME = 16


class ValueServerError(Exception):
    """No values, for a reason that the message tells."""

    def bare(self) -> "ValueServerError":
        """This one, to be kept: its traceback would keep all that the frames of a step know, the
        logits of all texts among it."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self


class Unreachable(ValueServerError):
    """No connection, or it broke."""


class TimedOut(ValueServerError):
    """No answer within the time-out."""


class Refused(ValueServerError):
    """The server answered with an error status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class BadReply(ValueServerError):
    """The answer cannot be read."""


class Mismatch(ValueServerError):
    """The server's values are not for this model's tokens, or not of the model that it told of."""


class CircuitOpen(ValueServerError):
    """The server failed a moment ago and is not asked yet."""


class ValueClient:
    """Asks one value server, and after a failure leaves it alone for a while.

    The first call, and the first after a failure, asks `/v1/model` what is served, in an eighth
    of the time-out, so that a dead server costs a step little. For one thread at a time.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 2.0,
        backoff_s: tuple[float, float] = (0.5, 2.0),
        clock: Callable[[], float] = time.monotonic,
        **connection: Any,
    ) -> None:
        """backoff_s: first and longest pause after a failure; it doubles. connection: more of
        `endpoint.http_client`. Connects to nothing yet."""
        self._http = http_client(url, timeout_s=timeout_s, **connection)
        self._timeout_s = timeout_s
        self._first_pause, self._longest_pause = backoff_s
        self._pause = self._first_pause
        self._open_until = -float("inf")
        self._clock = clock
        self._info: wire.ModelInfo | None = None
        self._keys: Keys | None = None

    def model(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
        """What is served. Asks once per connection, and then compares the tokenizers.

        fingerprint: of the tokenizer in use, None to compare nothing. Raises ValueServerError.
        """
        if self._info is None:
            with self._guarded():
                self._info = self._probe(fingerprint)
        return self._info

    def keys(self, info: wire.ModelInfo) -> "Keys":
        """Of the lookahead head of this model, asked for once. Raises ValueServerError."""
        from lenvm_vllm.values.lookahead import Keys  # torch, which others do without

        if self._keys is None or self._keys.model_id != info.model_id:
            with self._guarded():
                largest = LARGEST_INFO + 2 * info.vocab_size * info.lookahead_rank
                seconds = KEYS_TIME * self._timeout_s
                body = self._ask("GET", wire.KEYS_PATH, seconds, largest)
                self._keys = Keys(wire.decode_keys(body, info))
        return self._keys

    def step(self, request: wire.StepRequest) -> wire.StepReply:
        """The answer; each row's logits, and its query, are all numbers or, where it has none in
        time, all NaN. Raises ValueServerError.
        """
        with self._guarded():
            return self._step(request)

    @property
    def rests(self) -> bool:
        """Whether the server failed a moment ago and is not asked yet."""
        return self._clock() < self._open_until

    def close(self) -> None:
        self._http.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """The circuit breaker; foreign errors come out as ours."""
        if self.rests:
            raise CircuitOpen("the value server failed a moment ago")
        try:
            with _errors_of_ours():
                yield
        except ValueServerError:
            self._info = None
            self._open_until = self._clock() + self._pause
            self._pause = min(2 * self._pause, self._longest_pause)
            raise

    def _probe(self, fingerprint: Callable[[], str | None]) -> wire.ModelInfo:
        body = self._ask("GET", wire.MODEL_PATH, self._timeout_s / 8, LARGEST_INFO)
        info = msgspec.json.decode(body, type=wire.ModelInfo)
        if info.version != wire.WIRE_VERSION:
            raise Mismatch(f"version: the server speaks {info.version}, not {wire.WIRE_VERSION}")
        ours = fingerprint()
        if ours is not None and ours != info.tokenizer_fingerprint:
            raise Mismatch(
                f"tokenizer_fingerprint: the value model was trained with "
                f"{info.tokenizer_fingerprint[:12]}, vLLM serves {ours[:12]}"
            )
        return info

    def _step(self, request: wire.StepRequest) -> wire.StepReply:
        with step_span(request) as headers:
            body = self._ask(
                "POST",
                wire.STEP_PATH,
                self._timeout_s,
                wire.largest_reply(request),
                content=wire.encode(request),
                headers={"Content-Type": wire.MEDIA_TYPE, **headers},
            )
        reply = wire.decode_reply(body, request)
        if self._info is not None and reply.model_id != self._info.model_id:
            raise Mismatch("model_id: the server was started anew, with another model or limits")
        self._pause = self._first_pause
        return reply

    def _ask(self, method: str, path: str, timeout_s: float, largest: int, **fields: Any) -> bytes:
        """The body of the answer, complete within `timeout_s` and of `largest` bytes at most."""
        deadline = self._clock() + timeout_s
        with self._http.stream(method, path, timeout=timeout_s, **fields) as reply:
            body = bytearray()
            for piece in reply.iter_bytes():
                body += piece
                if len(body) > largest:
                    raise BadReply(f"{path}: more than {largest} bytes")
                if self._clock() > deadline:  # each piece in time, but not all of them
                    raise TimedOut("no answer in time (it came in pieces)")
        if reply.status_code != 200:
            text = body[:200].decode(errors="replace")
            raise Refused(f"{path}: HTTP {reply.status_code} {text}", reply.status_code)
        return bytes(body)


@contextmanager
def _errors_of_ours() -> Iterator[None]:
    """The one place where foreign errors become ours."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise TimedOut(f"no answer in time ({type(error).__name__})") from error
    except httpx.DecodingError as error:
        raise BadReply(f"{error}") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise Unreachable(f"{error}") from error
    except (wire.WireError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadReply(f"{error}") from error

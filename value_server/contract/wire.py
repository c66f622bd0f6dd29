"""Messages between plugin and value server.

`POST /v1/step` carries one `StepRequest` each way as msgpack. Ragged rows travel flat: row i
owns the next `token_counts[i]` entries of `tokens` and the next `candidate_counts[i]` entries
of `candidates`, both packed little-endian int32. Everything else over HTTP is JSON.

Legend: B sessions of this step, T tokens, K candidates, all rows together.
"""

import math
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

WIRE_VERSION = 5
MEDIA_TYPE = "application/msgpack"
LONGEST_REASON = 160  # characters of why a row is refused

STEP_PATH = "/v1/step"
MODEL_PATH = "/v1/model"
PREDICT_PATH = "/v1/predict"
VALUES_PATH = "/v1/values"
SESSIONS_PATH = "/v1/sessions"
KEYS_PATH = "/v1/lookahead-keys"
PICTURES_PATH = "/v1/pictures"

# sha256 of a picture's file, in hex.
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, msgspec.Meta(ge=1)]


def model_path(name: str) -> str:
    """What the paths of a value model begin with that has a name on its server."""
    return f"/models/{name}"


class WireError(ValueError):
    """A message that cannot be decoded or contradicts itself, in `field`, if that is known."""

    def __init__(self, problem: str, field: str | None = None) -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field


class StepRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """New tokens and candidates of B sessions.

    sessions: B ids, distinct, chosen by the client.
    starts: B; position in the session's text of its first token in this message. 0 opens the
        session anew. A start below what the server holds rewinds the session to it, so a
        request may be repeated, and a text may come in pieces. A row that starts above what is
        held takes nothing, and has no values.
    token_counts, candidate_counts: B.
    tokens: T int32, emitted since the last step (prompt included at start 0).
    candidates: K int32.
    closed: ids of sessions that ended; unknown ids are ignored.
    lookahead_rank: r of the queries that are wanted of each row, beside its candidates' logits; 0:
        none. Another than the ModelInfo tells is an error.
    budget_ms: milliseconds that the server may take from the message's arrival to its answer.
        Rows without values by then are answered without, and their texts are computed on. 0: it
        answers as soon as it has taken the texts, or after half a second. None: it waits until
        all rows have values.
    pictures: row that starts at 0 -> digests of all pictures of its text, in order.
    """

    version: int = WIRE_VERSION
    sessions: list[str]
    starts: list[int]
    token_counts: list[int]
    tokens: bytes
    candidate_counts: list[int]
    candidates: bytes
    closed: list[str] = []
    lookahead_rank: int = 0
    budget_ms: float | None = None
    pictures: dict[int, list[Digest]] = {}


class StepReply(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """model_id: of the ModelInfo by which the logits have to be read.
    logits: K float32 z in the order of the request, NaN in rows that have none in time.
    queries: B x (1 + r) float32, b and q of each row's text, where the request asks for them: after
        a next token x the logit is z = b + q.k_x, with k of LookaheadKeys. NaN as above.
    held: B; tokens of each row's text that the server has now: the `start` to go on from. Less
        than the row's own start where its session is lost, the start where there was no room.
    refused: row → why it will never have values; the others of the message are not concerned.
    """

    version: int = WIRE_VERSION
    model_id: str = ""
    logits: bytes
    queries: bytes = b""
    held: list[int]
    refused: dict[int, str] = {}


class ModelInfo(msgspec.Struct, kw_only=True):
    """What `GET /v1/model` tells about the served value model.

    model_id: another one where any of the other facts is another.
    base_fingerprint: of the base model's weights that it was trained on; empty: not known.
    lookahead_rank: r of its lookahead head; 0: it has none.
    sees_pictures: whether the server takes them, by `PUT /v1/pictures/{digest}`.
    picture_token: stands in texts for a row of a picture, seen or not; -1: there is none.
    """

    version: int = WIRE_VERSION
    model_id: str = ""
    gamma: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    base_model: str
    base_fingerprint: str = ""
    tokenizer_fingerprint: str
    vocab_size: Count
    max_position: Count
    max_sessions: Count
    max_candidates: Count
    lookahead_rank: int = 0
    sees_pictures: bool = False
    picture_token: int = -1


class LookaheadKeys(msgspec.Struct, kw_only=True):
    """What `GET /v1/lookahead-keys` tells, as msgpack: k of all tokens, once per checkpoint.

    keys: V x r float16.
    """

    version: int = WIRE_VERSION
    model_id: str
    rank: int
    keys: bytes


_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(StepRequest)
_reply_decoder = msgspec.msgpack.Decoder(StepReply)
_keys_decoder = msgspec.msgpack.Decoder(LookaheadKeys)


def pack_ids(ids: "list[int] | NDArray[Any]") -> bytes:
    """Token ids as little-endian int32."""
    return np.asarray(ids, dtype="<i4").tobytes()


def unpack_ids(data: bytes) -> NDArray[np.int32]:
    """(N,) token ids; shares memory with `data`, so it is read-only."""
    return np.frombuffer(data, dtype="<i4")


def pack_logits(z: NDArray[np.float32]) -> bytes:
    """(N,) logits as little-endian float32."""
    return np.ascontiguousarray(z, dtype="<f4").tobytes()


def unpack_logits(data: bytes) -> NDArray[np.float32]:
    """(N,) logits; read-only view of `data`."""
    return np.frombuffer(data, dtype="<f4")


def pack_queries(queries: NDArray[np.float32]) -> bytes:
    """Queries, in any shape, as little-endian float32."""
    return pack_logits(queries)


def unpack_queries(data: bytes, rank: int) -> NDArray[np.float32]:
    """(B, 1 + r) queries; read-only view of `data`."""
    return np.frombuffer(data, dtype="<f4").reshape(-1, 1 + rank)


def pack_keys(keys: NDArray[Any]) -> bytes:
    """Lookahead keys as little-endian float16."""
    return np.ascontiguousarray(keys, dtype="<f2").tobytes()


def unpack_keys(data: bytes, rank: int) -> NDArray[np.float16]:
    """(V, r) keys; read-only view of `data`."""
    return np.frombuffer(data, dtype="<f2").reshape(-1, rank)


def encode(message: StepRequest | StepReply | LookaheadKeys) -> bytes:
    """The message as msgpack."""
    return _encoder.encode(message)


def decode_request(data: bytes) -> StepRequest:
    """A checked request. Raises WireError naming the field that is wrong."""
    try:
        request = _request_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"step request: {error}") from error
    _check_version(request.version)
    rows = len(request.sessions)
    if len(set(request.sessions)) != rows:
        raise WireError("an id occurs twice", "sessions")
    for name in ("starts", "token_counts", "candidate_counts"):
        numbers = getattr(request, name)
        if len(numbers) != rows:
            raise WireError(f"{len(numbers)} entries for {rows} sessions", name)
        if any(n < 0 for n in numbers):
            raise WireError(f"negative entry {min(numbers)}", name)
    if request.lookahead_rank < 0:
        raise WireError(f"negative: {request.lookahead_rank}", "lookahead_rank")
    if request.budget_ms is not None and not 0 <= request.budget_ms < math.inf:
        raise WireError(f"not a number of milliseconds: {request.budget_ms}", "budget_ms")
    for row in request.pictures:
        if row not in range(rows) or request.starts[row]:
            raise WireError(f"row {row} is none that starts at 0", "pictures")
    _check_ids("tokens", request.tokens, sum(request.token_counts))
    _check_ids("candidates", request.candidates, sum(request.candidate_counts))
    return request


def largest_reply(request: StepRequest) -> int:
    """Bytes that the reply to `request`, or an error in its place, has at most."""
    logits = 4 * sum(request.candidate_counts)
    reasons = (LONGEST_REASON + 32) * len(request.sessions)
    return 4096 + logits + _queries_size(request) + reasons


def decode_reply(data: bytes, request: StepRequest) -> StepReply:
    """A checked reply to `request`. Raises WireError."""
    try:
        reply = _reply_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"step reply: {error}") from error
    _check_version(reply.version)
    rows, candidates = len(request.sessions), sum(request.candidate_counts)
    if len(reply.logits) != 4 * candidates:
        raise WireError(f"{len(reply.logits)} bytes for {candidates} candidates", "logits")
    if len(reply.held) != rows:
        raise WireError(f"{len(reply.held)} entries for {rows} sessions", "held")
    wholes = zip(request.starts, request.token_counts, strict=True)
    if any(not 0 <= n <= start + m for n, (start, m) in zip(reply.held, wholes, strict=True)):
        raise WireError("more than was told, or less than nothing", "held")
    if any(not 0 <= row < rows for row in reply.refused):
        raise WireError(f"rows {sorted(reply.refused)} of {rows}", "refused")
    _check_logits(unpack_logits(reply.logits), np.array(request.candidate_counts, dtype=np.int64))
    _check_queries(reply.queries, request)
    return reply


def decode_keys(data: bytes, info: ModelInfo) -> LookaheadKeys:
    """Checked keys of the model that `info` tells of. Raises WireError."""
    try:
        keys = _keys_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"lookahead keys: {error}") from error
    _check_version(keys.version)
    for name, got, told in (
        ("model_id", keys.model_id, info.model_id),
        ("rank", keys.rank, info.lookahead_rank),
        ("keys", len(keys.keys), 2 * info.vocab_size * info.lookahead_rank),
    ):
        if got != told:
            raise WireError(f"got {got}, the model's facts say {told}", name)
    if not np.isfinite(unpack_keys(keys.keys, keys.rank)).all():
        raise WireError("one is not finite", "keys")
    return keys


def _check_logits(z: NDArray[np.float32], counts: NDArray[np.int64]) -> None:
    if np.isinf(z).any():
        raise WireError("one is infinite", "logits")
    owner = np.repeat(np.arange(len(counts)), counts)
    known = np.bincount(owner, ~np.isnan(z), minlength=len(counts))
    if ((known != 0) & (known != counts)).any():
        raise WireError("a row has values of some of its candidates only", "logits")


def _queries_size(request: StepRequest) -> int:
    """Bytes."""
    rank = request.lookahead_rank
    return 4 * len(request.sessions) * (1 + rank) if rank else 0


def _check_queries(data: bytes, request: StepRequest) -> None:
    rank = request.lookahead_rank
    if len(data) != _queries_size(request):
        rows = len(request.sessions)
        raise WireError(f"{len(data)} bytes for {rows} sessions and rank {rank}", "queries")
    queries = unpack_queries(data, rank)
    if np.isinf(queries).any():
        raise WireError("one is infinite", "queries")
    unknown = np.isnan(queries)
    if (unknown.any(1) != unknown.all(1)).any():
        raise WireError("a row has some of its numbers only", "queries")


def _check_version(version: int) -> None:
    if version != WIRE_VERSION:
        raise WireError(f"got {version}, this side speaks {WIRE_VERSION}", "version")


def _check_ids(name: str, data: bytes, count: int) -> None:
    if len(data) != 4 * count:
        raise WireError(f"{len(data)} bytes, the counts say {4 * count}", name)

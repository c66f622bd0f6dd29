"""The wire: what is sent arrives, what is wrong is refused with the name of its field."""

import contextlib
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from value_server.contract.wire import (
    LONGEST_REASON,
    WIRE_VERSION,
    LookaheadKeys,
    ModelInfo,
    StepReply,
    StepRequest,
    WireError,
    decode_keys,
    decode_reply,
    decode_request,
    encode,
    largest_reply,
    pack_ids,
    pack_keys,
    pack_logits,
    pack_queries,
    unpack_ids,
    unpack_keys,
    unpack_logits,
    unpack_queries,
)

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=5)


def request(rows: list[tuple[list[int], list[int]]], **changes: Any) -> StepRequest:
    """A request of one session per (tokens, candidates)."""
    fields: dict[str, Any] = {
        "sessions": [f"s{i}" for i in range(len(rows))],
        "starts": list(range(len(rows))),
        "token_counts": [len(tokens) for tokens, _ in rows],
        "tokens": pack_ids([t for tokens, _ in rows for t in tokens]),
        "candidate_counts": [len(candidates) for _, candidates in rows],
        "candidates": pack_ids([c for _, candidates in rows for c in candidates]),
        "closed": ["old"],
        "budget_ms": 12.5,
    }
    return StepRequest(**(fields | changes))


TWO_ROWS = [([1, 2, 3], [4]), ([], [5, 6])]


@given(st.lists(st.tuples(IDS, IDS), max_size=4))
def test_request_round_trip(rows: list[tuple[list[int], list[int]]]) -> None:
    sent = request(rows)
    got = decode_request(encode(sent))
    assert got == sent
    assert unpack_ids(got.tokens).tolist() == [t for tokens, _ in rows for t in tokens]
    assert unpack_ids(got.candidates).tolist() == [c for _, some in rows for c in some]


@given(st.lists(st.floats(width=32, allow_infinity=False) | st.none(), max_size=8))
def test_reply_round_trip(z: list[float | None]) -> None:
    """A row for each logit; NaN: it has none in time."""
    sent = request([([1], [2])] * len(z))
    logits = np.array([np.nan if value is None else value for value in z], dtype=np.float32)
    refused = {row: "too long" for row, value in enumerate(z) if value is None}
    held = [0 if row in refused else row + 1 for row in range(len(z))]
    reply = StepReply(logits=pack_logits(logits), held=held, refused=refused)
    got = decode_reply(encode(reply), sent)
    assert got == reply
    np.testing.assert_array_equal(unpack_logits(got.logits), logits)
    assert len(encode(reply)) < largest_reply(sent)


@given(st.lists(st.booleans(), max_size=5), st.integers(1, 4))
def test_queries_round_trip(known: list[bool], rank: int) -> None:
    """NaN: a row that has none in time."""
    sent = request([([1], [])] * len(known), lookahead_rank=rank)
    assert decode_request(encode(sent)) == sent
    queries = np.arange(len(known) * (1 + rank), dtype=np.float32).reshape(-1, 1 + rank)
    queries[~np.array(known, dtype=bool)] = np.nan
    reply = StepReply(logits=b"", queries=pack_queries(queries), held=[0] * len(known))
    got = decode_reply(encode(reply), sent)
    np.testing.assert_array_equal(unpack_queries(got.queries, rank), queries)


def test_no_queries_where_none_are_asked_for() -> None:
    got = decode_reply(encode(StepReply(logits=bytes(12), held=[3, 1])), request(TWO_ROWS))
    assert unpack_queries(got.queries, 0).size == 0


def test_the_longest_reasons_fit_the_largest_reply() -> None:
    sent = request([([1], [2])] * 100, lookahead_rank=256)
    refused = dict.fromkeys(range(100), "x" * LONGEST_REASON)
    reply = StepReply(
        logits=pack_logits(np.full(100, np.nan)),
        queries=pack_queries(np.full((100, 257), np.nan, dtype=np.float32)),
        held=[1] * 100,
        refused=refused,
    )
    assert len(encode(reply)) < largest_reply(sent)


def test_bytes_are_little_endian() -> None:
    assert pack_ids([1]) == b"\x01\x00\x00\x00"
    assert pack_logits(np.array([1.0], dtype=">f4")) == b"\x00\x00\x80\x3f"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": WIRE_VERSION + 1}, f"version: got {WIRE_VERSION + 1}, .* {WIRE_VERSION}"),
        ({"sessions": ["s0", "s0"]}, "sessions: an id occurs twice"),
        ({"starts": [0]}, "starts: 1 entries for 2 sessions"),
        ({"starts": [0, -3]}, "starts: negative entry -3"),
        ({"token_counts": [3]}, "token_counts: 1 entries for 2 sessions"),
        ({"token_counts": [4, -1]}, "token_counts: negative entry -1"),
        ({"token_counts": [3, 1]}, "tokens: 12 bytes, the counts say 16"),
        ({"tokens": b"\0" * 13}, "tokens: 13 bytes, the counts say 12"),
        ({"candidate_counts": [1, 2, 3]}, "candidate_counts: 3 entries for 2 sessions"),
        ({"candidate_counts": [4, -1]}, "candidate_counts: negative entry -1"),
        ({"candidates": b""}, "candidates: 0 bytes, the counts say 12"),
        ({"lookahead_rank": -1}, "lookahead_rank: negative: -1"),
        ({"budget_ms": -0.1}, "budget_ms: not a number of milliseconds: -0.1"),
        ({"budget_ms": float("nan")}, "budget_ms: not a number"),
        ({"budget_ms": float("inf")}, "budget_ms: not a number"),
        ({"pictures": {2: ["0" * 64]}}, "pictures: row 2 is none that starts at 0"),
        ({"pictures": {1: ["0" * 64]}, "starts": [0, 5]}, "pictures: row 1 is none that starts"),
        ({"pictures": {0: ["0" * 64, "A" * 64]}}, ".*regex.*pictures"),
    ],
)
def test_request_that_contradicts_itself(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode_request(encode(request(TWO_ROWS, **changes)))


@pytest.mark.parametrize("field", StepRequest.__struct_fields__)
def test_wrong_type_names_the_field(field: str) -> None:
    message = msgspec.to_builtins(request(TWO_ROWS), builtin_types=(bytes,)) | {field: {"x": 0}}
    with pytest.raises(WireError, match=rf"\$\.{field}"):
        decode_request(msgspec.msgpack.encode(message))


@pytest.mark.parametrize("field", ["sessions", "starts", "tokens", "candidates"])
def test_missing_field_is_named(field: str) -> None:
    message = msgspec.to_builtins(request(TWO_ROWS), builtin_types=(bytes,))
    del message[field]
    with pytest.raises(WireError, match=field):
        decode_request(msgspec.msgpack.encode(message))


def test_unknown_field_is_named() -> None:
    message = msgspec.to_builtins(request(TWO_ROWS), builtin_types=(bytes,)) | {"gamma": 0.9}
    with pytest.raises(WireError, match="gamma"):
        decode_request(msgspec.msgpack.encode(message))


def test_every_truncation_is_refused() -> None:
    sent = request(TWO_ROWS)
    whole, reply = encode(sent), encode(StepReply(logits=bytes(12), held=[3, 1]))
    for size in range(len(whole)):
        with pytest.raises(WireError):
            decode_request(whole[:size])
    for size in range(len(reply)):
        with pytest.raises(WireError):
            decode_reply(reply[:size], sent)


@given(st.binary(max_size=64))
def test_noise_is_a_wire_error_or_a_message(data: bytes) -> None:
    for decode in (decode_request, lambda d: decode_reply(d, request([]))):
        with contextlib.suppress(WireError):
            decode(data)


NAN, INF = (pack_logits(np.float32([value])) for value in (np.nan, np.inf))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (StepReply(version=0, logits=bytes(12), held=[3, 1]), "version: got 0"),
        (StepReply(logits=bytes(7), held=[3, 1]), "logits: 7 bytes for 3 candidates"),
        (StepReply(logits=bytes(16), held=[3, 1]), "logits: 16 bytes for 3 candidates"),
        (StepReply(logits=bytes(8) + INF, held=[3, 1]), "logits: one is infinite"),
        (StepReply(logits=bytes(8) + NAN, held=[3, 1]), "logits: .* some of its candidates only"),
        (StepReply(logits=bytes(12), held=[3]), "held: 1 entries for 2 sessions"),
        (StepReply(logits=bytes(12), held=[4, 1]), "held: more than was told"),
        (StepReply(logits=bytes(12), held=[-1, 1]), "held: .* less than nothing"),
        (StepReply(logits=bytes(12), held=[3, 1], refused={2: ""}), r"refused: rows \[2\] of 2"),
    ],
)
def test_reply_that_does_not_fit(reply: StepReply, message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode_reply(encode(reply), request(TWO_ROWS))


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (b"", "queries: 0 bytes for 2 sessions and rank 2"),
        (bytes(20), "queries: 20 bytes for 2 sessions and rank 2"),
        (bytes(20) + INF, "queries: one is infinite"),
        (bytes(20) + NAN, "queries: a row has some of its numbers only"),
    ],
)
def test_queries_that_do_not_fit(queries: bytes, message: str) -> None:
    reply = StepReply(logits=bytes(12), queries=queries, held=[3, 1])
    with pytest.raises(WireError, match=message):
        decode_reply(encode(reply), request(TWO_ROWS, lookahead_rank=2))


def test_queries_that_nobody_asked_for() -> None:
    reply = StepReply(logits=bytes(12), queries=bytes(8), held=[3, 1])
    with pytest.raises(WireError, match="queries: 8 bytes for 2 sessions and rank 0"):
        decode_reply(encode(reply), request(TWO_ROWS))


INFO = ModelInfo(
    model_id="m",
    gamma=0.9,
    base_model="",
    tokenizer_fingerprint="",
    vocab_size=3,
    max_position=1,
    max_sessions=1,
    max_candidates=1,
    lookahead_rank=2,
)
KEYS = np.arange(6, dtype=np.float16).reshape(3, 2)


def keys(**changes: Any) -> LookaheadKeys:
    fields: dict[str, Any] = {"model_id": "m", "rank": 2, "keys": pack_keys(KEYS)}
    return LookaheadKeys(**(fields | changes))


def test_keys_round_trip() -> None:
    got = decode_keys(encode(keys()), INFO)
    np.testing.assert_array_equal(unpack_keys(got.keys, got.rank), KEYS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 0}, "version: got 0"),
        ({"model_id": "other"}, "model_id: got other, the model's facts say m"),
        ({"rank": 3}, "rank: got 3, the model's facts say 2"),
        ({"keys": bytes(10)}, "keys: got 10, the model's facts say 12"),
        ({"keys": pack_keys(KEYS * np.float16("nan"))}, "keys: one is not finite"),
    ],
)
def test_keys_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode_keys(encode(keys(**changes)), INFO)

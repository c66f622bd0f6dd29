"""Lengths in words and characters through real processes, whose random model writes random bytes.

Values come at first; then their server is gone, and the limits hold the same.
"""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.pairs import Pair
from tests.e2e.test_matrix import ASK, CHAT, MESSAGES, RESPONSES, TEXT
from value_server.contract.units import count

pytestmark = [pytest.mark.e2e, pytest.mark.pair("tiny")]

MOST = 200  # tokens, which end no text here but one
# target: the least and the most that it allows
TARGETS: list[tuple[str, dict[str, Any], int, float]] = [
    ("characters", {"mode": "at_most", "characters": 20}, 0, 20),
    ("characters", {"characters": 30, "tolerance": 0.0}, 30, 30),
    ("characters", {"characters": 30, "tolerance": 0.1}, 27, 33),
    ("characters", {"mode": "range", "min_characters": 10, "max_characters": 15}, 10, 15),
    ("characters", {"mode": "at_least", "characters": 20}, 20, MOST),
    ("words", {"mode": "at_most", "words": 3}, 0, 3),
    ("words", {"words": 4, "tolerance": 0.0, "policy": "greedy"}, 4, 4),
    ("words", {"mode": "range", "min_words": 2, "max_words": 6}, 2, 6),
]


@pytest.fixture
def client(pair: Pair) -> httpx.Client:
    return pair.client


def ask(client: httpx.Client, path: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text that a client puts together, and its length_result."""
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    reply = client.post(path, json={"model": "tiny"} | ASK[path] | {limit: MOST} | fields)
    assert reply.status_code == 200, reply.text
    if not fields.get("stream"):
        return whole(path, reply.json())
    lines = (line.removeprefix("data: ") for line in reply.text.split("\n"))
    chunks = [json.loads(line) for line in lines if line.startswith("{")]
    if path in (CHAT, TEXT):
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        parts = (c.get("text", (c.get("delta") or {}).get("content")) for c in choices)
        return "".join(part or "" for part in parts), choices[-1]["length_result"]
    if path == MESSAGES:
        deltas = [chunk for chunk in chunks if chunk["type"] == "content_block_delta"]
        (end,) = (chunk for chunk in chunks if chunk["type"] == "message_delta")
        return "".join(chunk["delta"].get("text") or "" for chunk in deltas), end["length_result"]
    deltas = [chunk for chunk in chunks if chunk["type"] == "response.output_text.delta"]
    text, result = whole(path, chunks[-1]["response"])
    assert "".join(chunk["delta"] for chunk in deltas) == text
    return text, result


def whole(path: str, answer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if path in (CHAT, TEXT):
        (choice,) = answer["choices"]
        text = choice["text"] if path == TEXT else choice["message"]["content"]
        return text or "", choice["length_result"]
    parts = answer["content"] if path == MESSAGES else answer["output"][0]["content"]
    return "".join(part["text"] for part in parts), answer["length_result"]


@pytest.mark.parametrize("values", [True, False])
def test_limits_hold_on_every_door(pair, values):
    if values:
        return check_limits(pair.client, values)
    pair.kill_values()
    try:
        check_limits(pair.client, values)
    finally:
        pair.revive_values()


def check_limits(client, values):
    cells = [
        (path, unit, least, most, {"length_target": target, "stream": stream})
        for path in ASK
        for (unit, target, least, most), stream in itertools.product(TARGETS, (False, True))
    ]
    with ThreadPoolExecutor(16) as pool:
        told = list(pool.map(lambda cell: ask(client, cell[0], cell[-1]), cells))
    for cell, (text, result) in zip(cells, told, strict=True):
        _, unit, least, most, _ = cell
        assert least <= count(text, unit) <= most, (cell, text, result)
        assert "\ufffd" not in text
        assert (result["words"], result["characters"]) == (
            count(text, "words"),
            count(text, "characters"),
        )
        assert result["passed_rail"] is False
    assert any(result["steered_steps"] for _, result in told) is values


def test_a_stream_tells_its_progress_in_the_unit(client):
    body = {"stream": True, "length_target": {"characters": 60, "progress": 4}}
    reply = client.post(CHAT, json={"model": "tiny", "max_tokens": MOST} | ASK[CHAT] | body)
    told, text = [], ""
    for line in reply.text.split("\n"):
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                text += choice["delta"].get("content") or ""
                if progress := choice.get("length_progress"):
                    told.append(progress)
                    assert progress["characters"] == len(text)
                    assert progress["expected_characters"] is None or progress["expected"]
    assert told  # what waits for a busy API server comes together


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"length_target": {"words": 0}}, "length_target.words"),
        ({"length_target": {"chars": 10}}, "length_target.chars: unknown unit"),
        ({"length_target": {"words": 10, "tokens": 10}}, "length_target.words"),
        ({"length_target": {"mode": "at_least", "words": 900}}, "max_tokens: 200 contradicts"),
        ({"length_target": {"characters": 90}, "min_tokens": 10}, "min_tokens: 10 contradicts"),
        (
            {"length_target": {"characters": 90}, "include_stop_str_in_output": True},
            "include_stop_str_in_output: true contradicts length_target.characters",
        ),
    ],
)
def test_what_is_wrong_is_a_400(client, fields, named):
    reply = client.post(CHAT, json={"model": "tiny"} | ASK[CHAT] | {"max_tokens": MOST} | fields)
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]

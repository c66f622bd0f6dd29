"""Requests for a length of 80 as other clients really send them (`recorded/record.py`): each is
understood or refused with a word on what to do, and nothing that arrives is silently ignored."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lenvm_vllm.api.continuation import can_continue
from lenvm_vllm.target.request import FIELD, LengthTarget
from tests.support.through import post

RECORD: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "recorded" / "requests.json").read_text()
)
SENT = [row for row in RECORD if "body" in row]
MENTIONS = [row for row in SENT if re.search("length_?target", json.dumps(row["body"]), re.I)]
UNDERSTOOD = [row for row in MENTIONS if row["body"].keys() & {FIELD, "vllm_xargs"}]
MISPLACED = [row for row in MENTIONS if row not in UNDERSTOOD]
LOST = [row for row in SENT if row not in MENTIONS]
# vLLM gives a text completion 16 tokens where nobody says more.
TOO_SHORT = [
    row
    for row in UNDERSTOOD
    if row["path"] == "/v1/completions" and row["body"].get("max_tokens", 16) < 80
]


def by_name(rows: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("row", rows, ids=lambda row: row["written"])


def ask(row: dict[str, Any]) -> Any:
    return post(row["body"], path=row["path"])


@by_name([row for row in UNDERSTOOD if row not in TOO_SHORT])
def test_a_length_arrives(row: dict[str, Any]) -> None:
    app, status, answer = ask(row)
    assert status == 200, answer
    target = LengthTarget.from_extra_args(app.asked["vllm_xargs"])
    assert target is not None
    assert target.tokens == 80
    assert target.mode == ("at_most" if "at_most" in row["written"] else "equal_to")


@by_name(MISPLACED)
def test_a_length_in_a_wrong_place_is_refused(row: dict[str, Any]) -> None:
    app, status, answer = ask(row)
    assert (status, app.scope) == (400, None)
    assert "length_target at the top level of the body" in answer["error"]["message"]


@by_name(TOO_SHORT)
def test_a_limit_of_the_client_is_too_short(row: dict[str, Any]) -> None:
    _, status, answer = ask(row)
    limit = row["body"].get("max_tokens", 16)
    assert (status, f"max_tokens: {limit}" in answer["error"]["message"]) == (400, True)


@by_name([row for row in UNDERSTOOD if row not in TOO_SHORT])
def test_what_libraries_add_leaves_other_endings(row: dict[str, Any]) -> None:
    """But for what rules them out for everybody."""
    ruled_out = row["body"].keys() & {"response_format", "stop"}
    if row["path"] in ("/v1/chat/completions", "/v1/completions"):
        body = {name: value for name, value in row["body"].items() if name != FIELD}
        assert can_continue(body, LengthTarget.parse(80)) is not bool(ruled_out)


def test_what_a_client_loses_itself() -> None:
    """Nobody behind it can see that; docs/requests.md names them."""
    litellm = 'api_base=url, api_key="none", '
    named = [
        f'ChatLiteLLM({litellm}model="hosted_vllm/m", length_target=80)',
        f'ChatLiteLLM({litellm}model="hosted_vllm/m", extra_body={{"length_target": 80}})',
        f'litellm.responses("Hi", "hosted_vllm/m", {litellm}length_target=80)',
        'ask_proxy("/responses", model="plain", input="Hi", length_target=80)',
        "generateText({model",
    ]
    assert len(LOST) == len(named)
    for row, name in zip(LOST, named, strict=True):
        assert row["written"].startswith(name)
        app, status, _ = ask(row)
        assert (status, json.loads(app.body)) == (200, row["body"])


def test_the_others_say_so_themselves() -> None:
    for row in RECORD:
        assert row in SENT or "unexpected keyword argument 'length_target'" in row["error"]
    assert len(UNDERSTOOD) > 30
    assert len(MISPLACED) > 5

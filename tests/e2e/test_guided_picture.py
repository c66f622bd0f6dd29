"""Guided requests with pictures through a real vLLM and a real value server.

The served model is a tiny random Idefics 3: of the families here the one whose classes in vLLM
need no torchvision. The value model is a random head on the same model; at the end one that reads
text alone takes its place.
"""

import hashlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.systems.timing import wait_until
from lenvm_vllm.values.pictures import FRESH_S
from tests.e2e.pairs import Pair
from tests.support.seeing import value_checkpoint
from tests.support.servers import value_serve
from tests.support.shown import data_url, part, said
from tests.support.tiny_vision import PLACEHOLDER, png

pytestmark = [pytest.mark.e2e, pytest.mark.pair("seeing")]

TARGET = {"tokens": 60, "tolerance": 0.1, "endings": 1}
RAILS = range(54, 67)
SECONDS = 120  # for which anything is waited for


def body(*shown: bytes, **fields: Any) -> dict[str, Any]:
    """A chat about pictures. The model is random: it writes no picture's token itself."""
    asked = said("Say", *(part(data_url(file)) for file in shown), "all.")
    wish = {"length_target": TARGET, "logit_bias": {str(PLACEHOLDER): -100}}
    return {"model": "tiny", "messages": [asked], "max_tokens": 200} | wish | fields


def ask(pair: Pair, *shown: bytes, **fields: Any) -> dict[str, Any]:
    """The result of its only choice, which has as many tokens as vLLM itself counts."""
    reply = pair.client.post("/v1/chat/completions", json=body(*shown, **fields))
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    result: dict[str, Any] = answer["choices"][0]["length_result"]
    assert answer["usage"]["completion_tokens"] in range(result["tokens"], result["tokens"] + 2)
    return result


def was_steered(result: dict[str, Any]) -> bool:
    """By values, inside its rails."""
    assert result["tokens"] in RAILS, result
    assert "unseen" not in result
    return bool(result["steered_steps"] > 0)


def give(pair: Pair, *files: bytes) -> None:
    """To the value server, beforehand: a text is over before a picture that comes late is seen."""
    for file in files:
        path = f"/v1/pictures/{hashlib.sha256(file).hexdigest()}"
        assert pair.values.put(path, content=file).status_code == 204


def metric(client: httpx.Client, name: str) -> float:
    """Of all its labels."""
    text = client.get("/metrics").text
    return sum(float(n) for n in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def test_pictures_of_the_same_size(pair: Pair) -> None:
    """Each is held once, and their texts share nothing from the picture on; those of one do."""
    shared = []
    for number, new in ((0, 1), (1, 1), (0, 0)):
        held = metric(pair.values, "lenvm_pictures")
        give(pair, png(number))
        forwarded = metric(pair.values, "lenvm_tokens_forwarded_total")
        hits = metric(pair.values, "lenvm_prefix_hits_total")
        assert was_steered(ask(pair, png(number)))
        assert metric(pair.values, "lenvm_pictures") == held + new
        assert metric(pair.values, "lenvm_tokens_forwarded_total") > forwarded
        shared.append(metric(pair.values, "lenvm_prefix_hits_total") - hits)
    assert shared[0] <= shared[1] < shared[2] - 20  # rows of a picture
    assert metric(pair.client, "lenvm_lost_pictures_total") == 0
    assert metric(pair.client, "lenvm_unseen_requests_total") == 0


def test_a_picture_is_given_once(pair: Pair) -> None:
    """Two requests at once and two behind them, with other texts."""
    given = metric(pair.client, "lenvm_pictures_total")
    held = metric(pair.values, "lenvm_pictures")
    with ThreadPoolExecutor() as threads:
        for result in threads.map(lambda _: ask(pair, png(2), png(3, 40, 100)), range(2)):
            assert result["tokens"] in RAILS
    wait_until(lambda: metric(pair.values, "lenvm_pictures") == held + 2, SECONDS)
    assert was_steered(ask(pair, png(3, 40, 100), png(2)))
    assert was_steered(ask(pair, png(2)))
    assert metric(pair.client, "lenvm_pictures_total") == given + 2
    assert metric(pair.values, "lenvm_pictures") == held + 2


def test_a_stream(pair: Pair) -> None:
    give(pair, png(0))
    fields = body(png(0), stream=True)
    with pair.client.stream("POST", "/v1/chat/completions", json=fields) as reply:
        lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    choices = [c for line in lines[:-1] for c in json.loads(line)["choices"]]
    (result,) = (c["length_result"] for c in choices if "length_result" in c)
    assert was_steered(result)


def test_no_picture_is_vllms_own_400(pair: Pair) -> None:
    """And nothing else is harmed by it."""
    for data in (b"no picture", png(4)[:60]):
        guided = pair.client.post("/v1/chat/completions", json=body(data))
        plain = pair.client.post("/v1/chat/completions", json=body(data, length_target=None))
        assert guided.status_code == plain.status_code == 400
        assert guided.json()["error"]["message"] == plain.json()["error"]["message"]
    assert pair.is_well()
    give(pair, png(0))
    assert was_steered(ask(pair, png(0)))


def test_a_text_beside_it(pair: Pair) -> None:
    """Is guided as ever, in the same steps."""
    give(pair, png(0), png(1))
    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda shown: ask(pair, *shown), [(), (png(0),), (), (png(1),)])
    assert all(was_steered(result) for result in found)


def test_a_value_model_of_text_alone_takes_its_place(pair: Pair, tmp_path: Path) -> None:
    """A text with a picture then goes without values, and any other has them."""
    checkpoint = value_checkpoint(tmp_path / "value", pair.model, sees=False)
    pair.kill_values()
    port = pair.values.base_url.port
    assert port
    with value_serve(checkpoint, pair.model, tmp_path / "log", port):
        limit = time.monotonic() + SECONDS
        while not ask(pair)["steered_steps"]:
            assert time.monotonic() < limit
            time.sleep(0.5)
        time.sleep(FRESH_S)  # for which it is believed that pictures are seen
        forwarded = metric(pair.values, "lenvm_tokens_forwarded_total")
        result = ask(pair, png(0))
        assert result["tokens"] in RAILS
        assert result["unseen"]
        assert not result["steered_steps"]
        assert metric(pair.values, "lenvm_tokens_forwarded_total") == forwarded
        assert was_steered(ask(pair))
        assert pair.is_well()

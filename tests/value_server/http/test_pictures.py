"""Pictures as a client sends them: to a real process with a tiny model that sees, over a socket."""

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.support.seeing import Seer, file_of
from tests.support.tiny_vision import MORE, PLACEHOLDER, png
from tests.support.value_servers import as_client, served, step, step_body
from value_server.contract import wire
from value_server.contract.values import length_from_logit

pytestmark = pytest.mark.e2e

FLAGS = ("--max-body-bytes", "100000", "--picture-pixels", "20000")

PARTS = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{{ p['text'] if p['type'] == 'text' else '<image>' if p['type'] == 'image' }}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def seer(tmp_path_factory: pytest.TempPathFactory) -> Seer:
    return Seer.of("qwen2.5-vl", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def seeing(seer: Seer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL and log."""
    folder = tmp_path_factory.mktemp("seeing")
    seer.value.save(folder)
    tokenizer = tiny.tiny_tokenizer(MORE)
    tokenizer.chat_template = PARTS
    tokenizer.save_pretrained(folder)
    log = tmp_path_factory.mktemp("log") / "log"
    with served(folder, *FLAGS, log=log) as (url, process):
        yield url, log
        assert process.poll() is None
    assert "Traceback" not in log.read_text()


@pytest.fixture
def client(seeing: tuple[str, Path]) -> Iterator[httpx.Client]:
    with as_client(seeing[0]) as client:
        yield client


def digest_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def put(client: httpx.Client, body: bytes, digest: str | None = None) -> httpx.Response:
    return client.put(f"{wire.PICTURES_PATH}/{digest or digest_of(body)}", content=body)


def error_of(reply: httpx.Response) -> tuple[int, str, str]:
    error = reply.json()["error"]
    return reply.status_code, error["field"], error["message"]


def test_a_picture_comes_late_and_is_seen(client: httpx.Client, seer: Seer) -> None:
    text, pictures = seer.text([0, 1]), {0: [digest_of(file_of(n)) for n in (0, 1)]}
    rows: list[Any] = [("a", 0, text, [1, 2]), ("b", 0, [5, 6], [1])]
    assert put(client, file_of(0)).status_code == 204
    reply = step(client, *rows, pictures=pictures)
    assert (reply.held, reply.refused) == ([0, 2], {})
    assert np.isnan(wire.unpack_logits(reply.logits)).tolist() == [True, True, False]
    for _ in range(2):
        assert put(client, file_of(1)).status_code == 204
    reply = step(client, *rows, pictures=pictures)
    assert reply.held == [len(text), 2]
    expected = [seer.z([*text, c], [0, 1]) for c in (1, 2)]
    np.testing.assert_allclose(wire.unpack_logits(reply.logits)[:2], expected, atol=1e-4)
    reply = step(client, ("a", len(text), [2], [7]))
    expected = [seer.z([*text, 2, 7], [0, 1])]
    np.testing.assert_allclose(wire.unpack_logits(reply.logits), expected, atol=1e-4)
    assert "none of its 0 pictures" in step(client, ("c", 0, text, [1])).refused[0]
    metrics = client.get("/metrics").text
    assert "lenvm_pictures 2.0" in metrics
    assert "lenvm_rows_without_picture_total 1.0" in metrics
    assert 'lenvm_rows_refused_total{type="invalid_request"} 1.0' in metrics


def test_what_is_no_picture_or_too_large(client: httpx.Client, seeing: tuple[str, Path]) -> None:
    large, bomb = b"x" * 100_001, png(0, 200, 101)
    assert error_of(put(client, large))[:2] == (413, "body")
    for body, what in (
        (bomb, "200 x 101 pixels, must be at most 20000"),
        (png(0, 1, 201), "201 by 1 pixels, more than 200 to 1"),
        (b"the merger is off", "17 bytes, not a readable picture"),
        (b"", "0 bytes, not a readable picture"),
        (png(1)[:500], "500 bytes, not a readable picture"),
    ):
        status, field, message = error_of(put(client, body))
        assert (status, field) == (422, "body")
        assert what in message
        reply = step(client, ("x", 0, [PLACEHOLDER], [1]), pictures={0: [digest_of(body)]})
        assert "cannot be seen" in reply.refused[0]
    status, field, message = error_of(put(client, png(5), digest_of(png(6))))
    assert (status, field) == (422, "digest")
    assert digest_of(png(5)) in message
    assert error_of(put(client, png(5), "x"))[:2] == (422, "digest")
    reply = step(client, ("x", 0, [PLACEHOLDER], [1]), pictures={0: [digest_of(png(6))]})
    assert reply.refused == {}  # whose digest a wrong body took: it may yet come
    log = seeing[1].read_text()
    assert "merger" not in log
    assert not any(digest_of(body) in log for body in (large, bomb, png(5), png(6), file_of(0)))


def test_the_model_tells_what_it_sees(client: httpx.Client) -> None:
    info = client.get(wire.MODEL_PATH).json()
    assert (info["sees_pictures"], info["picture_token"]) == (True, PLACEHOLDER)


def test_predict_with_pictures(client: httpx.Client, seer: Seer) -> None:
    text, body = seer.text([2]), file_of(2)
    assert put(client, body).status_code == 204
    url = "data:image/png;base64," + base64.b64encode(file_of(2)).decode()
    expected = float(length_from_logit(torch.tensor(seer.z(text, [2])).double(), tiny.GAMMA))
    for picture in (digest_of(body), url):
        told = {"token_ids": text, "pictures": [picture]}
        found = client.post(wire.PREDICT_PATH, json=told).raise_for_status().json()
        assert found["predicted_tokens"] == pytest.approx(expected, rel=1e-3)
        every = client.post(wire.VALUES_PATH, json=told).raise_for_status().json()
        assert len(every["predicted_tokens"]) == len(text)
    part = {"type": "image_url", "image_url": {"url": url}}
    parts = [{"type": "text", "text": "a"}, part, {"type": "text", "text": "b"}]
    by_messages = {"messages": [{"role": "user", "content": parts}]}
    by_text = {"prompt": "a<image>b", "pictures": [url]}
    before, _, behind = tiny.tiny_tokenizer(MORE)("a<image>b")["input_ids"]
    ids = [before, *[PLACEHOLDER] * seer.rows(2), behind]
    expected = float(length_from_logit(torch.tensor(seer.z(ids, [2])).double(), tiny.GAMMA))
    for told in (by_text, by_messages):
        found = client.post(wire.PREDICT_PATH, json=told).raise_for_status().json()
        assert found["predicted_tokens"] == pytest.approx(expected, rel=1e-3)
    for told, field in (
        ({"token_ids": text}, "pictures"),
        ({"token_ids": text, "pictures": [digest_of(b"never came")]}, "pictures"),
        ({"token_ids": text, "pictures": ["http://host/cat.png"]}, "pictures.0"),
        ({"token_ids": text, "pictures": ["data:image/png;base64,%%%"]}, "pictures.0"),
        ({"token_ids": text, "pictures": ["data:text/plain;base64,aGVsbG8="]}, "body"),
        ({"prompt": "no placeholder", "pictures": [url]}, "prompt"),
    ):
        reply = client.post(wire.PREDICT_PATH, json=told)
        assert error_of(reply)[:2] == (422, field)


def test_a_model_that_reads_text_alone(tmp_path: Path, seer: Seer) -> None:
    """It tells the placeholder of its base model, and takes no pictures."""
    value = tiny.tiny_model(more=MORE)
    value.lenvm = seer.value.lenvm.__class__(
        gamma=tiny.GAMMA,
        base_model=seer.value.lenvm.base_model,
        weights="full",
        num_layers=2,
        tokenizer_fingerprint=seer.value.lenvm.tokenizer_fingerprint,
    )
    value.save(tmp_path)
    tiny.tiny_tokenizer(MORE).save_pretrained(tmp_path)
    with served(tmp_path) as (url, _), as_client(url) as client:
        info = client.get(wire.MODEL_PATH).json()
        assert (info["sees_pictures"], info["picture_token"]) == (False, PLACEHOLDER)
        there = client.head(f"{wire.PICTURES_PATH}/{digest_of(png())}")
        reply = put(client, png())
        assert (there.status_code, reply.status_code) == (409, 409)
        assert reply.json()["error"]["type"] == "text_only_model"
        body = step_body(("a", 0, [5], [1]), pictures={0: [digest_of(png())]})
        answer = client.post(wire.STEP_PATH, content=body).raise_for_status().content
        told = wire.decode_reply(answer, wire.decode_request(body))
        assert "reads text alone" in told.refused[0]

"""Lookahead over HTTP: a real application with a tiny model, over a real socket."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch
import uvicorn

from tests.support import tiny
from tests.support.value_servers import as_client, in_thread, naive, step, step_body
from value_server.contract import wire
from value_server.engine.engine import Engine
from value_server.http.app import create_app
from value_server.http.models import ServedModel
from value_server.http.text import Texts
from value_server.model.value_model import ValueModel

RANK = 5


@contextmanager
def serving(model: ValueModel, token: str = "") -> Iterator[httpx.Client]:
    served = ServedModel.of(Engine(model, slots=400), Texts(None))
    app = create_app({"": served}, tokens=[token] if token else [])
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with in_thread(server) as (url, _), as_client(url, token) as client:
        yield client


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serving(tiny.tiny_lookahead(RANK), token="hunter2") as client:
        yield client


@torch.inference_mode()
def query(text: list[int]) -> np.ndarray:
    model = tiny.tiny_lookahead(RANK)
    states = model.backbone(input_ids=torch.tensor([text])).last_hidden_state
    assert model.lookahead is not None
    return model.lookahead(states[0, -1]).numpy()


def info_of(client: httpx.Client) -> wire.ModelInfo:
    return wire.ModelInfo(**client.get(wire.MODEL_PATH).raise_for_status().json())


def keys_of(client: httpx.Client) -> np.ndarray:
    content = client.get(wire.KEYS_PATH).raise_for_status().content
    keys = wire.decode_keys(content, info_of(client))
    return wire.unpack_keys(keys.keys, keys.rank)


def test_exact_and_lookahead_clients_on_one_server(client: httpx.Client) -> None:
    both = step(client, ("a", 0, [1, 2], [4]), ("b", 0, [9], []), lookahead_rank=RANK)
    queries = wire.unpack_queries(both.queries, RANK)
    np.testing.assert_allclose(queries, [query([1, 2]), query([9])], atol=1e-4)
    np.testing.assert_allclose(wire.unpack_logits(both.logits), [naive([1, 2, 4])[-1]], atol=1e-4)
    exact = step(client, ("a", 2, [4], [5]))
    assert exact.queries == b""
    np.testing.assert_allclose(
        wire.unpack_logits(exact.logits), [naive([1, 2, 4, 5])[-1]], atol=1e-4
    )
    again = step(client, ("a", 3, [5], []), lookahead_rank=RANK)
    np.testing.assert_allclose(
        wire.unpack_queries(again.queries, RANK), [query([1, 2, 4, 5])], atol=1e-4
    )
    assert "lenvm_rows_lookahead_total 3.0" in client.get("/metrics").text


def test_rows_without_values_have_no_queries(client: httpx.Client) -> None:
    reply = step(
        client, ("c", 0, [258], []), ("d", 3, [1], []), ("e", 0, [1], []), lookahead_rank=5
    )
    queries = wire.unpack_queries(reply.queries, RANK)
    assert np.isnan(queries).all(1).tolist() == [True, True, False]
    assert set(reply.refused) == {0}


@pytest.mark.parametrize("rank", [1, 6, 2**40])
def test_another_rank_than_the_served_one_is_refused(client: httpx.Client, rank: int) -> None:
    reply = client.post(wire.STEP_PATH, content=step_body(("a", 0, [1], []), lookahead_rank=rank))
    assert reply.status_code == 422
    message = f"lookahead_rank: {rank} is not the served one (5)"
    assert reply.json()["error"] == {
        "type": "invalid_request",
        "message": message,
        "field": "lookahead_rank",
    }


def test_keys_are_those_of_the_model(client: httpx.Client) -> None:
    model = tiny.tiny_lookahead(RANK)
    assert model.lookahead is not None
    with torch.inference_mode():
        expected = model.lookahead.keys(model.backbone.get_input_embeddings().weight)
    np.testing.assert_allclose(keys_of(client), expected, rtol=1e-2, atol=1e-2)
    assert info_of(client).lookahead_rank == RANK


def test_keys_ask_for_the_token(client: httpx.Client) -> None:
    with as_client(str(client.base_url)) as other:
        assert other.get(wire.KEYS_PATH).status_code == 401


def test_other_keys_are_another_model() -> None:
    model = tiny.tiny_lookahead(RANK)
    with serving(tiny.tiny_lookahead(RANK)) as client:
        first = info_of(client)
    with serving(tiny.tiny_lookahead(RANK)) as client:
        assert info_of(client) == first
    assert model.lookahead is not None
    with torch.no_grad():
        model.lookahead.token_keys.bias[0] += 1
    with serving(model) as client:
        assert info_of(client).model_id != first.model_id


def test_a_model_without_lookahead() -> None:
    with serving(tiny.tiny_model()) as client:
        assert info_of(client).lookahead_rank == 0
        reply = client.get(wire.KEYS_PATH)
        assert reply.status_code == 404
        message = "the model has no lookahead head"
        assert reply.json()["error"] == {"type": "not_found", "message": message, "field": None}
        reply = client.post(
            wire.STEP_PATH, content=step_body(("a", 0, [1], []), lookahead_rank=RANK)
        )
        assert reply.status_code == 422
        error = reply.json()["error"]
        assert error["field"] == "lookahead_rank"
        assert error["message"] == "lookahead_rank: 5 is not the served one (none)"

"""Several value models in one server: each client gets those of its own, whatever the others do."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray
from opentelemetry.util.http import parse_excluded_urls

from lenvm_vllm.values.client import Refused, ValueClient
from tests.support import tiny
from tests.support.blocked import SECONDS, wait_until
from tests.support.value_servers import as_client, in_thread, naive, served, step, step_body
from value_server.contract import wire
from value_server.engine.engine import Engine
from value_server.http.app import create_app
from value_server.http.models import ServedModel
from value_server.http.telemetry import UNTRACED
from value_server.http.text import Texts
from value_server.serve import ValueServer, by_name
from value_server.settings import ServerSettings

TEXT = [5, 6, 7, 5, 9, 11, 5]
CANDIDATES = [4, 5, 6]
SEEDS = {"a": 0, "org/b": 1}


def values(client: ValueClient) -> list[NDArray[np.float32]]:
    """Logits behind each token of TEXT, told token by token."""
    client.model(lambda: None)
    found = []
    for start, token in enumerate(TEXT):
        body = step_body(("same name", start, [token], CANDIDATES))
        found.append(wire.unpack_logits(client.step(wire.decode_request(body)).logits))
    return found


def asked(url: str, **options: Any) -> list[NDArray[np.float32]]:
    client = ValueClient(url, timeout_s=SECONDS, **options)
    try:
        return values(client)
    finally:
        client.close()


def figure(url: str, line: str) -> float:
    """A number of /metrics."""
    found = httpx.get(f"{url}/metrics", timeout=SECONDS, trust_env=False).text.splitlines()
    return float(next(each for each in found if each.startswith(line + " ")).split()[-1])


@pytest.mark.e2e
def test_two_models_of_one_process(tmp_path: Path) -> None:
    """Two clients at a time, with the same session and text; each as of a server of its own."""
    paths = {name: tiny.tiny_checkpoint(tmp_path / f"lr=1e-{s}", s) for name, s in SEEDS.items()}
    named = [f"{name}={path}" for name, path in paths.items()]
    with served(named[0], named[1]) as (url, _), ThreadPoolExecutor() as pool:
        urls = {name: url + wire.model_path(name) for name in SEEDS}
        both = dict(zip(urls, pool.map(asked, urls.values()), strict=True))
        slots = {name: figure(url, f'lenvm_slots{{model="{name}"}}') for name in SEEDS}
        steps = {name: figure(url, f'lenvm_step_seconds_count{{model="{name}"}}') for name in SEEDS}
        with as_client(urls["a"]) as client:
            told = client.post(wire.PREDICT_PATH, json={"prompt": "hello"}).raise_for_status()
            assert told.json()["predicted_words"] > 0  # by the tokenizer of its checkpoint
    assert slots == dict.fromkeys(SEEDS, 200)  # of the 400 of the whole server
    assert steps == dict.fromkeys(SEEDS, len(TEXT))
    socket = tmp_path / "s"
    with served(paths["a"]) as (url, _):
        alone = {"a": asked(url)}
    with served(named[1], uds=socket):
        alone["org/b"] = asked(f"unix:{socket}:{wire.model_path('org/b')}")
    for name, seed in SEEDS.items():
        np.testing.assert_allclose(both[name], alone[name], atol=1e-5)
        for end, found in enumerate(both[name], 1):
            plain = [naive([*TEXT[:end], c], seed=seed)[-1] for c in CANDIDATES]
            np.testing.assert_allclose(found, plain, atol=1e-4)
    assert np.abs(np.subtract(both["a"], both["org/b"])).max() > 0.1


@dataclass(frozen=True)
class Both:
    url: str
    engines: dict[str, Engine]
    server: ValueServer

    @property
    def forwarded(self) -> int:
        return sum(engine.forwarded for engine in self.engines.values())


def both(*names: str, **options: Any) -> Iterator[Both]:
    engines = {name: Engine(tiny.tiny_model(seed), slots=400) for seed, name in enumerate(names)}
    models = {
        name: ServedModel.of(engine, Texts(None), name=name) for name, engine in engines.items()
    }
    app = create_app(models, **options)
    server = ValueServer(uvicorn.Config(app, log_level="warning"), app.state.models, 0)
    with in_thread(server) as (url, _):
        yield Both(url, engines, server)


@pytest.fixture
def two() -> Iterator[Both]:
    yield from both("a", "b")


@pytest.fixture
def with_a_nameless_one() -> Iterator[Both]:
    yield from both("", "b", tokens=["secret"])


@pytest.mark.parametrize(
    ("prefix", "told"),
    [("/models/c", "no model 'c'"), ("/models/a/b", "no model 'a/b'"), ("", "names no model")],
)
def test_a_model_that_is_not_here_is_refused_before_any_work(
    two: Both, prefix: str, told: str
) -> None:
    client = ValueClient(two.url + prefix, timeout_s=SECONDS)
    with pytest.raises(Refused, match=r"404.*unknown_model.*this server has.*: a, b\"") as refusal:
        values(client)
    assert told in str(refusal.value)
    client.close()
    with as_client(two.url + prefix) as http:
        for reply in (
            http.post(wire.STEP_PATH, content=step_body(("s", 0, [1], [2]))),
            http.post(wire.STEP_PATH, content=b"no message"),
            http.post(wire.PREDICT_PATH, json={"token_ids": [1]}),
            http.get(wire.KEYS_PATH),
            http.delete(f"{wire.SESSIONS_PATH}/s"),
        ):
            assert (reply.status_code, reply.json()["error"]["type"]) == (404, "unknown_model")
    assert two.forwarded == 0
    assert figure(two.url, 'lenvm_errors_total{type="unknown_model"}') == 6


def test_a_client_that_names_no_model_gets_the_nameless_one(with_a_nameless_one: Both) -> None:
    """As before a second model came."""
    url = with_a_nameless_one.url
    for prefix, seed in (("", 0), ("/models/b", 1)):
        plain = [naive([*TEXT, c], seed=seed)[-1] for c in CANDIDATES]
        np.testing.assert_allclose(asked(url + prefix, token="secret")[-1], plain, atol=1e-4)
    with as_client(url) as stranger:
        for prefix in ("", "/models/b"):
            assert stranger.get(f"{prefix}/ready").status_code == 200
            assert stranger.get(prefix + wire.MODEL_PATH).status_code == 401
        assert stranger.get("/models/c/ready").status_code == 401
        assert stranger.delete(f"/models/b{wire.SESSIONS_PATH}/ready").status_code == 401


def test_a_model_that_fails_for_good_leaves_the_other_at_work(
    two: Both, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> NDArray[np.float32]:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(two.engines["a"], "_forward", fails)
    with as_client(two.url) as client, as_client(f"{two.url}/models/b") as other:
        assert step(other, ("s", 0, [1, 2], [3])).held == [2]
        body = step_body(("s", 0, [1, 2], [3]))
        assert client.post(f"/models/a{wire.STEP_PATH}", content=body).status_code == 503
        wait_until(lambda: client.get("/models/a/health").status_code == 503)
        assert client.get("/models/a/ready").json()["error"]["type"] == "not_ready"
        for path in ("/health", "/ready", "/models/b/health", "/models/b/ready"):
            assert client.get(path).status_code == 200
        assert step(other, ("s", 2, [3], [4])).held == [3]
        plain = naive([1, 2, 3, 5])[-1], naive([1, 2, 3, 5], seed=1)[-1]
        found = wire.unpack_logits(step(other, ("s", 3, [], [5])).logits)
        np.testing.assert_allclose(found, plain[1:], atol=1e-4)
        assert figure(two.url, 'lenvm_pass_failures_total{model="a"}') >= 1
        assert figure(two.url, 'lenvm_pass_failures_total{model="b"}') == 0
        wait_until(lambda: bool(two.server.ended))
    assert (two.server.ended, two.server.broken) == ({"a"}, False)
    assert caplog.text.count("the engine of a does not work any more") == 1
    assert "value engine a: " in caplog.text


def test_what_goes_wrong_is_counted_for_its_model(
    two: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug of ours, too, which is answered outside of the routes; of no name that is none."""

    def fails(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("value_server.http.routes.check_rank", fails)
    body = step_body(("s", 0, [1, 2], [3]))
    with as_client(two.url) as client:
        assert client.post(f"/models/b{wire.STEP_PATH}", content=b"none").status_code == 400
        assert client.get("/models/b/metrics").status_code == 200
        for _ in range(2):
            assert client.get("/models/x/metrics").status_code == 404
        assert client.post(f"/models/b{wire.STEP_PATH}", content=body).status_code == 500
    for kind in ("internal_error", "malformed_request"):
        assert figure(two.url, f'lenvm_errors_total{{model="b",type="{kind}"}}') == 1
    assert figure(two.url, 'lenvm_errors_total{type="unknown_model"}') == 2


def test_traces_leave_out_routes_and_no_model() -> None:
    excluded = parse_excluded_urls(UNTRACED)
    for prefix in ("", "/models/a"):
        for path in ("/health", "/ready", "/metrics", f"{wire.PICTURES_PATH}/{'0' * 64}"):
            assert excluded.url_disabled(f"http://values{prefix}{path}")
    for name in ("healthcare", "ready/metrics"):
        assert not excluded.url_disabled(f"http://ready{wire.model_path(name)}{wire.STEP_PATH}")


def test_names_of_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "lr=1").mkdir()
    given = ["a=/x", "Org/Model-7B.v2=/y=1", f"{tmp_path}/lr=1"]
    paths = [Path("/x"), Path("/y=1"), tmp_path / "lr=1"]
    assert by_name(given) == dict(zip(("a", "Org/Model-7B.v2", ""), paths, strict=True))
    assert by_name(["/nowhere"]) == {"": Path("/nowhere")}
    for wrong in ("a b=/x", "../a=/x", "=/x", "a=", "a//b=/x", "a/=/x", "ä=/x", "a?=/x"):
        with pytest.raises(ValueError, match="must be CHECKPOINT or NAME=CHECKPOINT"):
            by_name([wrong])
    for twice, told in (
        (["a=/x", "a=/y"], "the name 'a' twice, /x and /y"),
        (["/x", "/y"], "two without a name, /x and /y"),
        ([], "none is given"),
    ):
        with pytest.raises(ValueError, match=told):
            by_name(twice)


def test_what_cannot_be_served_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from value_server import serve

    def load(*_: object) -> Engine:
        raise AssertionError("loaded")

    monkeypatch.setattr(serve, "load", load)
    good = tiny.tiny_checkpoint(tmp_path / "good")
    settings = ServerSettings(slots=100)
    for pair in itertools.permutations((good, tmp_path / "none")):
        with pytest.raises(ValueError, match=r"none/config\.json: no such file"):
            serve.build_app(dict(zip("ab", pair, strict=True)), settings)
    with pytest.raises(ValueError, match="slots: 100 for 2 models, at least 64 each"):
        serve.build_app({"a": good, "b": good}, settings)

"""Pictures of a request: which are found, what becomes of them, and what is left out."""

import asyncio
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest

from lenvm_vllm.api.intake import proof
from lenvm_vllm.api.middleware import LengthTargetMiddleware
from lenvm_vllm.api.pictures import Pictures, logger, places_of
from lenvm_vllm.api.routes import BATCH, CHAT, GENERATE, INVOCATIONS, MESSAGES, RESPONSES, TEXT
from lenvm_vllm.host import served
from lenvm_vllm.settings import Settings, load_settings
from lenvm_vllm.target.request import MEDIA
from lenvm_vllm.values.pictures import PictureServers
from tests.support.fakes import INFO
from tests.support.shown import data_url, part, png, said, with_vllms_client
from tests.support.through import Keeper, chunk, send_through

FILES = [png(0), png(1), png(2)]
DIGESTS = [hashlib.sha256(data).hexdigest() for data in FILES]
URLS = [data_url(data) for data in FILES]


def anthropic(data: bytes) -> dict[str, Any]:
    _, _, encoded = data_url(data).partition(",")
    source = {"type": "base64", "media_type": "image/png", "data": encoded}
    return {"type": "image", "source": source}


# ---- which are found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [said("a", part(URLS[0])), said(part(URLS[1]), "b")]}),
        (CHAT, {"messages": [said({"image_url": URLS[0]}, {"image_url": {"url": URLS[1]}})]}),
        (INVOCATIONS, {"messages": [said(part(URLS[0]), part(URLS[1]))]}),
        (
            RESPONSES,
            {"input": [said(*({"type": "input_image", "image_url": u} for u in URLS[:2]))]},
        ),
        (MESSAGES, {"messages": [said(anthropic(FILES[0])), said("b", anthropic(FILES[1]))]}),
    ],
)
def test_pictures_in_the_order_of_the_text(path: str, body: Any) -> None:
    assert [place.url for place in places_of(body, path)] == URLS[:2]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"prompt": "a"}),
        (CHAT, {}),
        (CHAT, {"messages": "a"}),
        (CHAT, {"messages": [7, {}, {"content": "a"}, {"content": [7, "a", {"type": "text"}]}]}),
        (CHAT, {"messages": [said({"type": "image_url"}), said({"image_url": {"url": 5}})]}),
        (CHAT, {"messages": [said({"type": "input_audio", "input_audio": {"data": "x"}})]}),
        (CHAT, {"messages": [said(part(""))]}),
        # vLLM takes what it has under this name, which may be another picture.
        (CHAT, {"messages": [said(part(URLS[0])), said(part(URLS[1]) | {"uuid": "cat"})]}),
        (BATCH, {"messages": [[said(part(URLS[0]))], [said(part(URLS[1]))]]}),
        # vLLM puts them before the others of the message.
        (MESSAGES, {"messages": [said({"type": "tool_result", "content": [anthropic(FILES[0])]})]}),
        # It leaves the first out, and has the second: as many as are found, and another one.
        (
            MESSAGES,
            {
                "messages": [
                    said(anthropic(FILES[0])) | {"role": "system"},
                    said({"type": "tool_result", "content": [anthropic(FILES[1])]}),
                ]
            },
        ),
        (MESSAGES, {"messages": [said(part(URLS[0]), {"type": "image", "source": 5})]}),
        (GENERATE, {"token_ids": [1], "features": {}}),
    ],
)  # fmt: skip
def test_none_where_there_are_none_or_none_that_are_sure(path: str, body: Any) -> None:
    assert places_of(body, path) == []


# ---- through the middleware


class Servers:
    """A value server that keeps its pictures. sees: whether its model does."""

    def __init__(self, sees: bool = True) -> None:
        self.sees = sees
        self.files: dict[str, bytes] = {}
        self.asked = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        if request.method == "GET":
            info = msgspec.structs.replace(INFO, sees_pictures=self.sees)
            return httpx.Response(200, content=msgspec.json.encode(info))
        digest = request.url.path.rpartition("/")[2]
        if request.method == "HEAD":
            return httpx.Response(204 if digest in self.files else 404)
        self.files[digest] = request.content
        return httpx.Response(204)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The configuration of a vLLM that takes pictures."""
    model = SimpleNamespace(
        max_model_len=1000,
        skip_tokenizer_init=True,
        override_generation_config={},
        allowed_local_media_path="",
        allowed_media_domains=None,
        multimodal_config=SimpleNamespace(mm_processor_kwargs=None, media_io_kwargs={}),
    )
    config = SimpleNamespace(
        reasoning_config=None,
        additional_config={},
        model_config=model,
        scheduler_config=None,
        speculative_config=None,
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        parallel_config=SimpleNamespace(data_parallel_size=1, enable_batch_sharded_sampling=False),
    )
    monkeypatch.setattr(served, "config", config)
    return config


def through(body: Any, world: Servers, path: str = CHAT, **settings: Any) -> tuple[Any, list[str]]:
    """(request that reaches vLLM, what the engine is told of its pictures)."""
    keeper = Keeper()
    counted: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        middleware = LengthTargetMiddleware(keeper)
        options = load_settings({"lenvm": settings})
        servers = PictureServers(options, counted.append, httpx.MockTransport(world))
        middleware._pictures = Pictures(options, servers)
        await with_vllms_client(middleware(scope, receive, send))
        await servers.settle()

    send_through(app, chunk(json.dumps(body).encode()), path=path)
    assert counted == ["pictures"] * len(world.files)
    asked = json.loads(keeper.body)
    return asked, asked.get("vllm_xargs", {}).get(MEDIA)


def chat(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"model": "m", "length_target": 50, "messages": [said("look:", *parts)]} | more


@pytest.mark.usefixtures("vllm")
def test_the_engine_is_told_and_the_server_has_them() -> None:
    world, body = Servers(), chat(part(URLS[0]), part(URLS[1]), part(URLS[0]))
    asked, told = through(body, world)
    digests = [DIGESTS[0], DIGESTS[1], DIGESTS[0]]
    assert told == [proof(digests), *digests]
    assert world.files == dict(zip(DIGESTS[:2], FILES[:2], strict=True))
    assert asked["messages"] == body["messages"]


@pytest.mark.usefixtures("vllm")
def test_anthropics_form() -> None:
    world = Servers()
    body = chat() | {"messages": [said(anthropic(FILES[2]))], "max_tokens": 99}
    asked, told = through(body, world, MESSAGES)
    assert told == [proof(DIGESTS[2:]), DIGESTS[2]]
    assert asked["messages"] == body["messages"]


@pytest.mark.usefixtures("vllm")
def test_a_client_cannot_tell_instead() -> None:
    own = {"vllm_xargs": {MEDIA: ["x", "f" * 64]}}
    told = through(chat(part(URLS[0]), **own), Servers())[1]
    assert told == [proof(DIGESTS[:1]), DIGESTS[0]]


def test_a_file_becomes_its_bytes(vllm: Any, tmp_path: Path) -> None:
    """What vLLM reads is what was given to the value server, whatever becomes of the file."""
    (path := tmp_path / "x.png").write_bytes(FILES[0])
    vllm.model_config.allowed_local_media_path = str(tmp_path)
    world = Servers()
    asked, told = through(chat(part(path.as_uri())), world)
    assert told == [proof(DIGESTS[:1]), DIGESTS[0]]
    assert asked["messages"][0]["content"][1] == part(URLS[0])


@pytest.mark.parametrize("policy", ["landing", "rails"])
@pytest.mark.usefixtures("vllm")
def test_not_where_no_values_are_wanted(policy: str) -> None:
    world = Servers()
    target = {"tokens": 50, "policy": policy}
    assert through(chat(part(URLS[0]), length_target=target), world)[1] is None
    assert not world.asked


# ---- what is left out


@pytest.mark.parametrize(
    ("parts", "more", "settings"),
    [
        ([part(URLS[0]), part(URLS[1])], {}, {"max_pictures": 1}),
        ([part(URLS[0])], {}, {"max_pictures": 0}),
        ([part(URLS[0])], {}, {"max_picture_bytes": len(FILES[0]) - 1}),
        ([part(URLS[0])], {}, {"max_picture_pixels": 599}),
        ([part(URLS[0])], {"mm_processor_kwargs": {"max_pixels": 9}}, {}),
        ([part(URLS[0])], {"media_io_kwargs": {"image": {"image_mode": None}}}, {}),
        ([part(data_url(b"no picture"))], {}, {}),
        ([part(data_url(b""))], {}, {}),
        ([part(data_url(png(0, form="ICO")))], {}, {}),
        ([part("file:///etc/hostname")], {}, {}),
        ([part("data:image/png,plain")], {}, {}),
        ([part(URLS[0]), part("http://127.0.0.1:9/x.png")], {}, {}),
        ([part(URLS[0])], {"length_target": None}, {}),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_the_request_goes_on_as_it_came(
    parts: Any, more: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM says what is wrong with it, if anything is."""
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", "1")
    world, body = Servers(), chat(*parts, **more)
    asked, told = through(body, world, **settings)
    assert (told, world.files) == (None, {})
    assert asked["messages"] == body["messages"]


@pytest.mark.parametrize("facts", [None, {"mm_processor_kwargs": {"max_pixels": 9}}])
def test_not_where_vllm_has_a_way_of_its_own(facts: Any, vllm: Any) -> None:
    other = facts and SimpleNamespace(
        **{"mm_processor_kwargs": None, "media_io_kwargs": {}} | facts
    )
    vllm.model_config.multimodal_config = other
    world = Servers()
    assert through(chat(part(URLS[0])), world)[1] is None
    assert not world.asked


@pytest.mark.usefixtures("vllm")
def test_a_text_only_model_is_shown_nothing() -> None:
    world = Servers(sees=False)
    assert through(chat(part(URLS[0])), world)[1] is None
    assert (world.asked, world.files) == (1, {})


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("content", [None, ""])
def test_a_token_that_cannot_be_read_costs_values_alone(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "token").write_text(content)
    told: list[Any] = []
    monkeypatch.setattr(logger, "warning", lambda *words: told.append(words))
    pictures = Pictures(Settings(token_file=tmp_path / "token"))
    for _ in range(2):
        request = chat(part(URLS[0]))
        asyncio.run(pictures.take(request, None, CHAT))  # type: ignore[arg-type]
        assert request == chat(part(URLS[0]))
    assert len(told) == 1


def test_a_request_without_pictures_asks_nobody() -> None:
    """Nor is a client made."""
    pictures = Pictures(Settings())
    request = {"messages": [said("a", "b"), {"role": "assistant", "content": "c"}]}
    asyncio.run(pictures.take(request, None, CHAT))  # type: ignore[arg-type]
    assert pictures._servers is None


# ---- forecasts


@pytest.mark.parametrize(
    ("urls", "sees", "stand"),
    [
        (URLS[:1], True, True),
        (URLS[:1], False, False),
        (["http://127.0.0.1:9/x.png"], True, False),  # an unguided request goes on as it came
        ([data_url(bytes(3000))], True, False),
        (URLS[:2], True, False),  # too large together
    ],
)
@pytest.mark.usefixtures("vllm")
def test_a_forecast_is_for_pictures_that_stand_in_the_request(
    urls: list[str], sees: bool, stand: bool
) -> None:
    async def ask() -> bool:
        options = load_settings({"lenvm": {"max_picture_bytes": 2000}})
        servers = PictureServers(options, print, httpx.MockTransport(Servers(sees)))
        return await Pictures(options, servers).stand_in(chat(*map(part, urls)), CHAT)

    assert asyncio.run(ask()) is stand

"""Pictures from a client's request to steered logits: the middleware, a real value server that
sees, and both model runners' adapters.

What vLLM would make of a request, its tokens and its list of pictures, is made by hand. So the
values can be compared with plain transformers', for both runners, and for Qwen2.5-VL, whose classes
in vLLM do not import without torchvision. A real vLLM is asked in test_guided_picture.py.

Legend: V vocabulary, K candidates.
"""

import asyncio
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from lenvm_vllm.api.forecast import Forecast
from lenvm_vllm.api.intake import take_in
from lenvm_vllm.api.middleware import LengthTargetMiddleware
from lenvm_vllm.engine.processor import LenvmLogitsProcessor
from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.v2 import V2Slots
from lenvm_vllm.host import served
from lenvm_vllm.settings import load_settings
from tests.support.fakes import config, entering, free, params
from tests.support.seeing import Seer
from tests.support.shown import data_url, part, said, with_vllms_client
from tests.support.through import Keeper, chunk, send_through
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_vision import MORE, PLACEHOLDER, SIZES, VOCABULARY, png
from tests.support.v1_batch import update
from tests.support.v2_slots import Runner
from tests.support.value_servers import as_client
from tests.support.value_servers import served as value_server
from value_server.contract import wire

pytestmark = pytest.mark.e2e

CANDIDATES = [40, 41, 42, 43]
TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}"
)


@dataclass
class World:
    """url: of the value server. seer: what it serves, and plain transformers' whole model."""

    url: str
    seer: Seer

    def get(self, path: str) -> Any:
        with as_client(self.url) as client:
            return client.get(path)


@pytest.fixture(scope="module", params=["qwen2.5-vl", "smolvlm"])
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base, checkpoint = (tmp_path_factory.mktemp(name) for name in ("base", "checkpoint"))
    seer = Seer.of(request.param, base)
    facts = {"pictures": True, "weights": "full", "num_layers": 3}
    seer.value.lenvm = msgspec.structs.replace(seer.value.lenvm, **facts)
    seer.value.save(checkpoint)
    tokenizer = tiny_tokenizer(MORE)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(checkpoint)
    with value_server(checkpoint) as (url, _):
        yield World(url, seer)


def file(number: int) -> bytes:
    return png(number, *SIZES[number % len(SIZES)])


def settings(world: World) -> dict[str, Any]:
    return {"url": world.url, "wait_floor_s": 30, "timeout_s": 240}


def vllm_config(world: World, v2: bool = False) -> Any:
    """As of a served model that takes pictures."""
    made = config(v2=v2, **settings(world))
    made.model_config.allowed_local_media_path, made.model_config.allowed_media_domains = "", None
    made.model_config.multimodal_config = SimpleNamespace(
        mm_processor_kwargs=None, media_io_kwargs={}
    )
    made.model_config.override_generation_config = {}
    made.model_config.hf_config = SimpleNamespace(image_token_id=PLACEHOLDER)
    made.cache_config = SimpleNamespace(enable_prefix_caching=True)
    made.parallel_config.data_parallel_size = 1
    made.scheduler_config = None
    return made


def through(world: World, numbers: list[int], patch: pytest.MonkeyPatch, late: bool = False) -> Any:
    """`extra_args` of a request with these pictures, as vLLM makes them of what reaches it; late:
    before any picture is on its way."""
    patch.setattr(served, "config", vllm_config(world))
    keeper = Keeper()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        middleware = LengthTargetMiddleware(keeper)
        await with_vllms_client(middleware(scope, receive, send))
        if (servers := middleware._pictures._servers) is None:
            return
        for task in servers._tasks if late else ():
            task.cancel()
        await servers.settle()
        for server in servers._of(""):
            await server.http.aclose()

    pictures = [part(data_url(file(number))) for number in numbers]
    length = free(60) | {"length_max_kl": 5.0}
    body = {"messages": [said("look:", *pictures)], "vllm_xargs": length}
    send_through(app, chunk(json.dumps(body).encode()))
    return json.loads(keeper.body)["vllm_xargs"]


def entered(world: World, numbers: list[int], xargs: Any) -> Any:
    """The engine's parameters, and the prompt."""
    prompt = world.seer.text(numbers)
    features = [SimpleNamespace(modality="image") for _ in numbers]
    request = entering(params(xargs), prompt, mm_features=features)
    take_in(vllm_config(world), request)
    return request.sampling_params, prompt


class Seen(EngineRows):
    """Keeps the (K,) values of each row of the last step, by its prompt."""

    def __init__(self, world: World, v2: bool) -> None:
        super().__init__(vllm_config(world, v2))
        ask = self._sessions.values
        self.z: dict[tuple[int, ...], Tensor] = {}

        def kept(states: Any, question: Any, pace: Any) -> Tensor:
            z = ask(states, question, pace)
            for state, row in zip(states, z, strict=True):
                self.z[tuple(state.prompt_ids)] = row
            return z

        self._sessions.values = kept  # type: ignore[method-assign]


def flat(rows: int) -> Tensor:
    logits = torch.full((rows, VOCABULARY), -torch.inf)
    logits[:, CANDIDATES] = 0.0
    return logits


def v1(world: World, texts: Any) -> Any:
    processor = LenvmLogitsProcessor(vllm_config(world), torch.device("cpu"), False)
    processor.batch.rows = rows = Seen(world, v2=False)
    added = [(row, wish, prompt, []) for row, (wish, prompt) in enumerate(texts)]
    processor.update_state(update(added=added))
    return rows, lambda: processor.apply(flat(len(texts)))


def v2(world: World, texts: Any) -> Any:
    runner = Runner(None)  # type: ignore[arg-type]
    rows = Seen(world, v2=True)
    runner.served.batch = V2Slots(rows, runner.slots)
    for slot, (wish, prompt) in enumerate(texts):
        runner.add(slot, wish, prompt)
    return rows, lambda: runner.step(*range(len(texts)), logits=flat(len(texts)))


def plain(world: World, prompt: list[int], numbers: list[int]) -> Tensor:
    """(K,) values by plain transformers, each candidate behind the whole text."""
    z = [world.seer.z([*prompt, candidate], numbers) for candidate in CANDIDATES]
    return torch.tensor(z, dtype=torch.float64)


@pytest.mark.parametrize("runner", [v1, v2])
def test_values_are_those_of_the_pictures(
    runner: Any, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of texts without, with one, with another one in its place, and with three."""
    shows: list[list[int]] = [[], [0], [3], [0, 1, 2]]
    texts = [entered(world, n, through(world, n, monkeypatch)) for n in shows]
    rows, step = runner(world, texts)
    step()
    for numbers, (_, prompt) in zip(shows, texts, strict=True):
        want = plain(world, prompt, numbers)
        if numbers in ([0], [3]) and texts[1][1] == texts[2][1]:
            continue  # equal placeholders: told apart below
        torch.testing.assert_close(rows.z[tuple(prompt)], want, rtol=1e-4, atol=1e-4)


def test_two_pictures_with_equal_placeholders(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for numbers in ([0], [3]):
        text = entered(world, numbers, through(world, numbers, monkeypatch))
        rows, step = v1(world, [text])
        step()
        got = rows.z[tuple(text[1])]
        torch.testing.assert_close(got, plain(world, text[1], numbers), rtol=1e-4, atol=1e-4)
        found.append((text[1], got))
    assert found[0][0] == found[1][0]
    assert not torch.allclose(found[0][1], found[1][1], atol=1e-3)


@pytest.mark.parametrize("runner", [v1, v2])
def test_a_late_picture_means_no_values_until_it_is_there(
    runner: Any, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = {v1: 6, v2: 9}[runner]  # nobody has given it before
    wish, prompt = entered(world, [number], through(world, [number], monkeypatch, late=True))
    rows, step = runner(world, [(wish, prompt)])
    monkeypatch.setattr("lenvm_vllm.engine.messages.PICTURES_S", (0.0, 0.0))
    step()
    assert rows.z[tuple(prompt)].isnan().all()
    digest = hashlib.sha256(file(number)).hexdigest()
    with as_client(world.url) as client:
        url = f"{wire.PICTURES_PATH}/{digest}"
        assert client.put(url, content=file(number)).status_code == 204
    step()
    want = plain(world, prompt, [number])
    torch.testing.assert_close(rows.z[tuple(prompt)], want, rtol=1e-4, atol=1e-4)


def test_a_text_with_other_pictures_than_told_has_no_values(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The served model's processor has made other rows of it than the value model's."""
    wish, prompt = entered(world, [0], through(world, [0], monkeypatch))
    prompt.insert(prompt.index(PLACEHOLDER), PLACEHOLDER)
    rows, step = v1(world, [(wish, prompt)])
    for _ in range(3):
        step()
        assert rows.z[tuple(prompt)].isnan().all()


def test_what_cannot_be_seen_is_lost_and_the_request_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose header is a picture's, and nothing behind it."""
    monkeypatch.setitem(globals(), "file", lambda number: png(0)[:60])
    xargs = through(world, [0], monkeypatch)
    request = entering(params(xargs), [7], mm_features=[SimpleNamespace(modality="image")])
    take_in(vllm_config(world), request)
    prompt = world.seer.text([1])
    rows, step = v1(world, [(request.sampling_params, prompt)])
    assert step()[0, CANDIDATES].isfinite().all()
    assert rows.z[tuple(prompt)].isnan().all()


def test_a_forecast_with_a_picture(world: World) -> None:
    """Where its placeholders alone tell how large it is; a family with tokens between its tiles
    takes token ids only."""
    url = data_url(file(0))
    made = Forecast(load_settings({"lenvm": settings(world)}))
    asked = {"messages": [said("look:", part(url))]}
    told = asyncio.run(made.tokens(asked, None, shown=True))
    if world.seer.name != "qwen2.5-vl":
        assert told is None
        return
    ids = [*tiny_tokenizer(MORE).encode("look:"), *[PLACEHOLDER] * world.seer.rows(0)]
    with as_client(world.url) as client:
        body = {"token_ids": ids, "pictures": [url]}
        alone = client.post(wire.PREDICT_PATH, json=body).raise_for_status().json()
    assert told == max(1, round(alone["predicted_tokens"]))

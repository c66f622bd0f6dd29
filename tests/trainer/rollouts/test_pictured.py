"""Prompts with pictures: from lines and data sets, to the sampler, into files of rollouts."""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import httpx
import pyarrow.parquet as pq
import pytest

from tests.support.fake_vllm import FakeVllm, Output, answer, rollout
from tests.support.prompts import write_prompts
from tests.support.tiny_vision import picture, png
from trainer.rollout_files import read_rollouts
from trainer.rollouts.prompts import Prompt, Selection
from trainer.rollouts.samplers import Sampling, ServerSampler
from value_server.model.pictures import Picture

ONE, OTHER = Picture.of(png(0)), Picture.of(png(1))


def url(data: bytes = ONE.data) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def shown(target: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": target}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def test_lines_with_pictures(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "one.png").write_bytes(ONE.data)
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [said("This"), shown("p/one.png"), said("and"), shown(url())]},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Which is larger?"},
    ]
    lines = [
        {"prompt": "What?", "images": "p/one.png"},
        {"prompt": "What?", "images": [url(OTHER.data), "p/one.png"], "system": "Be kind."},
        {"messages": asked, "id": "m"},
        {"prompt": "None."},
    ]
    found = list(Selection(limit=9).read(write_prompts(tmp_path / "a.jsonl", lines)))
    assert [p.pictures for p in found] == [(ONE,), (OTHER, ONE), (ONE, ONE), ()]
    assert found[0].messages() == [{"role": "user", "content": [shown(url()), said("What?")]}]
    assert found[1].messages()[0] == {"role": "system", "content": "Be kind."}
    asked[1]["content"][1] = shown(url())
    assert found[2].messages() == asked
    assert (found[2].id, found[2].text) == ("m", "Which is larger?")
    assert found[3].messages() == [{"role": "user", "content": "None."}]
    with pytest.raises(ValueError, match=r"^template: '{prompt}!', must be left out with messages"):
        list(Selection(template="{prompt}!").read(tmp_path / "a.jsonl"))


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts]}]}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"prompt": "a", "images": 3}, r"images: '3', must be a path, a data: URL"),
        ({"prompt": "a", "images": ["b.png"]}, r"images\[0\]: 'b.png', .* there is no file"),
        ({"prompt": "a", "images": "http://h/b.png"}, r"images: 'http://h/b.png'.*nothing is fet"),
        ({"prompt": "a", "images": "data:image/png,xx"}, r"images: .* must be in base64"),
        ({"prompt": "a", "images": "data:image/png;base64,?"}, r"images: 'data:image/png;base64,"),
        ({"prompt": "a", "images": url(b"GIF89a")}, r"images: 6 bytes, not a readable picture"),
        ({"prompt": "a", "images": [url()] * 33}, r"pictures: 33, must be at most 32"),
        (user(*[shown(url())] * 33), r"pictures: 33, must be at most 32"),
        (user(shown("https://h/b.png")), r"messages\[0\]: content\[0\]: image_url: 'https://h/b"),
        (user({"type": "video_url"}), r"messages\[0\]: content\[0\]: .* must be of type text or"),
        ({"messages": []}, r"messages: '\[\]', must be a list of messages"),
        ({"messages": ["a"]}, r"messages\[0\]: 'a', must be an object"),
        ({"messages": [{"role": "tool"}]}, r"messages\[0\]: role: 'tool', must be one of system"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: content: 'None', must be a text"),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            r"messages: the last role: 'assistant', must be user",
        ),
    ],
)
def test_what_is_wrong_is_named(line: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a.jsonl", [{"prompt": "good"}, line])
    with pytest.raises(ValueError, match=rf"a\.jsonl: line 2: {told}"):
        list(Selection().read(path))


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As MathVista has them: the picture decoded, in a column beside a path that is of no use."""
    rows = {"pid": ["1"], "query": ["Hint: …\nHow many?"], "image": ["images/1.jpg"]}
    rows |= {"decoded_image": [picture()]}
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("pid", "query", "image")}
        | {"decoded_image": datasets.Image()}
    )
    data = datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_names, **_options: data)
    (found,) = Selection().read(Path("mathvista"))
    assert (found.id, found.domain, found.text) == ("mathvista-0", "vision", "Hint: …\nHow many?")
    (own,) = found.pictures
    selection = Selection(column="query", picture_column="decoded_image")
    (again,) = selection.read(Path("hub:AI4Math/MathVista"))
    assert again.pictures == (own,)
    plain = [{"prompt": "a", "images": [picture(), {"bytes": OTHER.data, "path": None}]}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_names, **_options: plain)
    (several,) = Selection().read(Path("hub:any"))
    assert several.pictures == (own, OTHER)


class RefusedError(Exception):
    """As vLLM's own, no ValueError."""


class Seeing(FakeVllm):
    """A placeholder token 258 for each picture; texts of over `longest` bytes are too long."""

    longest = 50

    def chat(self, chats: Any, sampling: dict[str, Any], use_tqdm: bool) -> list[Output]:
        self.chats.append(chats)
        if any(len(str(said_of(chat))) > self.longest for chat in chats):
            raise RefusedError("The prompt is longer than the maximum model length of 50.")
        return [
            Output([1, *[258] * len(shown_in(chat)), 2], [answer("a", k) for k in range(2)])
            for chat in chats
        ]


def said_of(chat: Any) -> str:
    content = chat[-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def shown_in(chat: Any) -> list[Any]:
    content = chat[-1]["content"]
    return [] if isinstance(content, str) else [p for p in content if p["type"] == "image_url"]


def test_rollouts_of_the_engine_keep_each_picture_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = Seeing()
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    lines = [
        {"prompt": "a", "images": url()},
        {"prompt": "b", "images": [url(OTHER.data), url()]},
        {"prompt": "c" * 60, "images": url()},
        {"prompt": "d"},
    ]
    prompts = write_prompts(tmp_path / "p.jsonl", lines)
    rollout(prompts, tmp_path / "out", model="m")
    found = read_rollouts(tmp_path / "out")
    assert [r.pictures for r in found] == [(ONE,)] * 2 + [(OTHER, ONE)] * 2 + [()] * 2
    assert [r.prompt_ids.tolist() for r in found][::2] == [[1, 258, 2], [1, 258, 258, 2], [1, 2]]
    (file,) = (tmp_path / "out").glob("*.parquet")
    data = pq.read_table(file)["picture_bytes"].to_pylist()
    assert sum(one is not None for own in data for one in own or ()) == 2
    lines[0]["images"] = url(OTHER.data)
    with pytest.raises(ValueError, match=r"^prompts: .*part-00000.* was made with"):
        rollout(write_prompts(tmp_path / "p.jsonl", lines), tmp_path / "out", model="m")


def test_a_server_is_sent_data_urls() -> None:
    bodies: list[Any] = []

    def handle(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        choices = [{"token_ids": [5], "finish_reason": "stop"}]
        return httpx.Response(200, json={"prompt_token_ids": [1, 258, 2], "choices": choices})

    sampler = ServerSampler("http://host/v1", "m", transport=httpx.MockTransport(handle))
    sampler.sample([Prompt("0", "", "What?", pictures=(ONE,))], Sampling(n=1))
    assert bodies[0]["messages"] == [{"role": "user", "content": [shown(url()), said("What?")]}]

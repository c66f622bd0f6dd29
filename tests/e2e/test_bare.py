"""A real vLLM and a real value server on a machine without compilers: no request of ours ends it.

`pytest --without-compiler tests/e2e/test_steering.py` asks the same of all that steers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lenvm_vllm.commands.processes import free_port
from tests.support.bare import hide_compilers
from tests.support.servers import BARE_FLAG, value_serve, vllm_serve
from tests.support.tiny import tiny_checkpoint
from tests.support.tiny_llm import tiny_llm

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path]]:
    """vLLM, and its log."""
    folder, port = tmp_path_factory.mktemp("servers"), free_port()
    model, value = tiny_llm(folder / "model"), tiny_checkpoint(folder / "value")
    env, log = {"LENVM_URL": f"http://127.0.0.1:{port}"}, folder / "vllm.log"
    with pytest.MonkeyPatch.context() as patch:
        hide_compilers(patch, tmp_path_factory.mktemp("programs"))
        with (
            value_serve(value, model, folder / "values.log", port),
            vllm_serve(model, log, *BARE_FLAG, env=env) as url,
            httpx.Client(base_url=url, timeout=120) as client,
        ):
            yield client, log


def body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": "tiny", "messages": messages, "seed": 1, **fields}


@pytest.mark.parametrize(
    "target",
    [
        40,
        {"tokens": 40, "tolerance": 0.0},
        {"tokens": 40, "endings": 8},
        {"tokens": 40, "best_of": 4},
        {"mode": "at_most", "tokens": 40},
        {"mode": "at_least", "tokens": 40},
        {"mode": "range", "min_tokens": 30, "max_tokens": 40},
        {"mode": "tilt", "beta": -1.0},
    ],
)
def test_every_target_is_answered(bare: tuple[httpx.Client, Path], target: Any) -> None:
    client, _ = bare
    one = isinstance(target, dict) and {"endings", "best_of"} & target.keys()
    others = [{"n": 2}, {"stream": True}, {"temperature": 0.0}]
    for more in ({}, {"top_k": 15, "top_p": 0.9, "temperature": 0.7}, *([] if one else others)):
        fields = body(length_target=target, max_tokens=60, **more)
        reply = client.post("/v1/chat/completions", json=fields)
        assert reply.status_code == 200, reply.text
        assert client.get("/health").status_code == 200


def test_what_would_end_it_was_said_at_the_start(bare: tuple[httpx.Client, Path]) -> None:
    assert bare[1].read_text().count("no C++ compiler here: a request with logprobs") == 1

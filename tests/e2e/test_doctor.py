"""`lenvm doctor --vllm` before a real vLLM: whole, without values, and without its middleware."""

import re
from pathlib import Path

import pytest

from lenvm_vllm.commands.doctor import serving
from tests.e2e.pairs import KEY, Pair
from tests.support.doctor import look, rows
from tests.support.servers import vllm_serve
from tests.support.tiny_llm import tiny_llm

pytestmark = pytest.mark.e2e


@pytest.mark.pair("doors")
def test_with_the_flag_and_a_key(pair: Pair) -> None:
    asked = ("--model", str(pair.model), "--vllm", f"{pair.url}/v1")
    env = {"LENVM_URL": str(pair.values.base_url), "VLLM_API_KEY": KEY}
    code, text = look(*asked, **env)
    assert code == 0, text
    assert re.search("8 tokens were asked for and came, [1-7] of 8 steps with values", text)
    code, text = look(*asked, **env | {"VLLM_API_KEY": "other"})
    assert (code, "set VLLM_API_KEY to the key" in text) == (1, True)


@pytest.mark.pair("tiny")
def test_values_came_and_come_no_more(pair: Pair) -> None:
    pair.kill_values()
    try:
        asked = ("--model", str(pair.model), "--vllm", pair.url)
        code, text = look(*asked, LENVM_URL=str(pair.values.base_url))
    finally:
        pair.revive_values()
    assert code == 1
    wrong = [part for state, part, _ in rows(text) if state == "wrong"]
    assert wrong == ["value server", "a request"]
    assert "by the rails alone: vLLM gets no values" in text


@pytest.mark.pair("plain")
def test_without_the_flag(pair: Pair) -> None:
    version, request = serving.findings(pair.url)
    assert (version.state, request.state) == ("ok", "wrong")
    assert request.seen.startswith("vLLM runs without the plugin")


@pytest.mark.parametrize(
    ("flags", "plugins", "seen"),
    [
        (
            ("--logits-processors", "lenvm_vllm:LenvmLogitsProcessor"),
            "none",
            "vLLM runs the logits processor without its middleware",
        ),
        (
            ("--middleware", "lenvm_vllm.plugin.AtTheRoutes", "--no-enable-prefix-caching"),
            "lenvm",
            "8 tokens were asked for, 16 came: vLLM runs without the plugin",
        ),
    ],
)
def test_parts_are_missing(flags: tuple[str, ...], plugins: str, seen: str, tmp_path: Path) -> None:
    log, env = tmp_path / "vllm.log", {"VLLM_PLUGINS": plugins}
    with vllm_serve(tiny_llm(tmp_path / "model"), log, *flags, env=env) as url:
        version, request, *cache = serving.findings(url)
    assert (version.state, request.state) == ("ok", "wrong")
    assert request.seen.startswith(seen)
    assert bool(cache) == ("--no-enable-prefix-caching" in flags)

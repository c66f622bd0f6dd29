"""`lenvm doctor --vllm` before a real vLLM: whole, without values, and without its middleware."""

from pathlib import Path

import pytest

from lenvm_vllm.commands.doctor import serving
from lenvm_vllm.commands.processes import free_port
from tests.support.doctor import look, rows
from tests.support.servers import BARE_FLAG, value_serve, vllm_serve
from tests.support.tiny import tiny_checkpoint
from tests.support.tiny_llm import tiny_llm

pytestmark = pytest.mark.e2e


def test_with_the_flag(tmp_path: Path) -> None:
    """And an API key; values come, and then no more."""
    model, value, port = tiny_llm(tmp_path / "model"), tiny_checkpoint(tmp_path / "v"), free_port()
    env = {"LENVM_URL": f"http://127.0.0.1:{port}", "VLLM_API_KEY": "secret"}
    with vllm_serve(model, tmp_path / "vllm.log", *BARE_FLAG, env=env) as url:
        asked = ("--model", str(model), "--vllm", f"{url}/v1")
        with value_serve(value, model, tmp_path / "values.log", port):
            code, text = look(*asked, **env)
            assert code == 0, text
            assert "8 tokens were asked for and came, 7 of 8 steps with values" in text
            code, text = look(*asked, **env | {"VLLM_API_KEY": "other"})
            assert (code, "set VLLM_API_KEY to the key" in text) == (1, True)
        code, text = look(*asked, **env)
        assert code == 1
        wrong = [part for state, part, _ in rows(text) if state == "wrong"]
        assert wrong == ["value server", "a request"]
        assert "by the rails alone: vLLM gets no values" in text


@pytest.mark.parametrize(
    ("flags", "plugins", "seen"),
    [
        ((), "lenvm", "vLLM runs without the plugin"),
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

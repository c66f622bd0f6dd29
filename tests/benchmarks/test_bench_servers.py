"""What the servers of a benchmark are started with."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import servers


@pytest.mark.parametrize("ramp", [False, True])
def test_only_the_ramp_needs_the_first_model_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ramp: bool
) -> None:
    """vLLM's V2, the default on a GPU, refuses to start with processors of V1."""
    started: dict[str, Any] = {}

    def serve(*command: Any, env: dict[str, str], **_: Any) -> Any:
        started.update(command=command, env=env)
        return nullcontext(SimpleNamespace(url="http://vllm"))

    values = nullcontext(SimpleNamespace(url="http://values"))
    monkeypatch.setattr(servers, "lenvm_serve", lambda *_, **__: values)
    monkeypatch.setattr(servers, "vllm_serve", serve)
    with servers.served("model", tmp_path, tmp_path, dtype="float32", ramp=ramp) as endpoint:
        assert endpoint.url == "http://vllm/v1"
    assert ("benchmarks.ramp:Ramp" in started["command"]) == ramp
    assert (started["env"].get("VLLM_USE_V2_MODEL_RUNNER") == "0") == ramp

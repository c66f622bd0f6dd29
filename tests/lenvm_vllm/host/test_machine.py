"""What a bare machine lacks: seen, told, and no reason to end."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lenvm_vllm.host import machine
from lenvm_vllm.plugin import warn_of_logprobs
from tests.lenvm_vllm.commands.test_doctor import look
from tests.support.bare import hide_compilers

GIB = 1 << 30


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide_compilers(monkeypatch, tmp_path)
    assert shutil.which("sh") is not None


def test_torch_finds_none_either(no_compiler: None) -> None:
    """Our word for it is torch's own."""
    from torch._inductor import cpp_builder, exc

    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(exc.InvalidCxxCompiler):
        cpp_builder.cpp_compiler_search((None, "g++"))
    assert not machine.has_compiler()


def test_the_compiler_that_a_variable_names(
    no_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "sh")
    assert machine.has_compiler()


def test_the_plugin_says_what_would_end_the_engine(
    no_compiler: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "vllm.lenvm")
    monkeypatch.setattr(logging.getLogger("vllm.lenvm"), "propagate", True)
    warn_of_logprobs("cuda")
    assert caplog.messages == []
    warn_of_logprobs("cpu")
    (message,) = caplog.messages
    assert "logprobs" in message
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    warn_of_logprobs("cpu")
    assert len(caplog.messages) == 1


@pytest.mark.e2e
def test_doctor_on_a_bare_machine(no_compiler: None, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.touch()
    folder = str(closed / "cache")
    code, text = look(HF_HOME=folder, VLLM_CACHE_ROOT=folder, HF_HUB_OFFLINE="0")
    assert code == 1
    assert "wrong  compiler       no C++ compiler: vLLM needs --enforce-eager" in text
    assert text.count(f"wrong  folders        {folder}: not writable") == 2
    for variable in ("TORCH_COMPILE_DISABLE=1", "set HF_HOME", "set VLLM_CACHE_ROOT"):
        assert variable in text
    _, text = look(TORCH_COMPILE_DISABLE="1")
    assert "off    compiler       no C++ compiler" in text


def test_room_in_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    assert machine.shared_mib() == 64

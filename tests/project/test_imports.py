"""Who may import whom: one table of folders. Nothing points up."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"lenvm_vllm", "value_server", "trainer", "benchmarks", "tests"}
# A folder may import itself and what is named here, and nothing else of ours: a row imports rows
# above it only. The files beside the folders of a package put them together.
CONTRACT = ["value_server.contract"]
PURE = ["lenvm_vllm.steering", "lenvm_vllm.text", "lenvm_vllm.target"]
PLUGIN = [*PURE, "lenvm_vllm.host", "lenvm_vllm.telemetry", "lenvm_vllm.settings", *CONTRACT]
SCORES = ["value_server.model", *CONTRACT]
TRAINER = [
    *("trainer.data", "trainer.checks", "trainer.output", "trainer.plots", "trainer.rows"),
    *(
        "trainer.scan",
        "trainer.rollout_files",
        "trainer.resume",
        "trainer.reading",
        "trainer.candidates",
        "trainer.columns",
        "trainer.digests",
        "trainer.pictures",
        "trainer.seen",
    ),
    *SCORES,
]
MEASURED = ["lenvm_vllm", "value_server", "trainer", "tests.support.tiny", "tests.support.tiny_llm"]
ALLOWED = {
    "value_server/contract": [],
    "value_server/model": CONTRACT,
    "value_server/engine": SCORES,
    "value_server/http": ["value_server.engine", *CONTRACT],
    "value_server": ["value_server"],
    "lenvm_vllm/host": [],
    "lenvm_vllm/telemetry": [],
    "lenvm_vllm/steering": CONTRACT,
    "lenvm_vllm/text": ["lenvm_vllm.host", "lenvm_vllm.steering", *CONTRACT],
    "lenvm_vllm/target": [*PURE, "lenvm_vllm.settings", *CONTRACT],
    "lenvm_vllm/values": ["lenvm_vllm.settings", *CONTRACT],
    "lenvm_vllm/engine": ["lenvm_vllm.values", *PLUGIN],
    "lenvm_vllm/api": ["lenvm_vllm.values", *PLUGIN],
    "lenvm_vllm/commands": ["lenvm_vllm.api", "lenvm_vllm.values", "lenvm_vllm.plugin", *PLUGIN],
    "lenvm_vllm": ["lenvm_vllm", *CONTRACT],
    "trainer/rollouts": TRAINER,
    "trainer/lookahead": TRAINER,
    "trainer/evaluation": ["trainer.lookahead", *TRAINER],
    "trainer/training": ["trainer.evaluation", *TRAINER],
    "trainer": ["trainer", *SCORES],
    # They measure the inside, some of them of the tests' tiny random models.
    "benchmarks/systems": ["benchmarks", *MEASURED],
    "benchmarks/evidence": ["benchmarks", *MEASURED],
    "benchmarks": ["benchmarks", *MEASURED],
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


def of_folder(folder: str) -> list[Path]:
    """Its files; those of a folder inside, too, unless it has a row of its own."""
    paths = (path.relative_to(ROOT) for path in sorted((ROOT / folder).rglob("*.py")))
    return [p for p in paths if next(str(f) for f in p.parents if str(f) in ALLOWED) == folder]


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder: str) -> None:
    allowed = {*ALLOWED[folder], folder.replace("/", ".")}
    wrong = [
        f"{path} imports {name}"
        for path in of_folder(folder)
        for name in imported(ROOT / path)
        if name.split(".")[0] in OURS and not any(inside(name, package) for package in allowed)
    ]
    assert wrong == []


def test_every_folder_has_a_row() -> None:
    for package in OURS - {"tests"}:
        folders = {p.parent.relative_to(ROOT) for p in (ROOT / package).rglob("__init__.py")}
        assert all(str(f) in ALLOWED or len(f.parts) > 2 or f.name == "examples" for f in folders)


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
        ("lenvm_vllm.plugin", {"torch", "vllm", "fastapi", "httpx"}),
        ("lenvm_vllm.target.request", {"torch", "vllm", "fastapi"}),
        ("lenvm_vllm.api.middleware", {"torch", "vllm", "fastapi"}),
        ("lenvm_vllm.commands.cli", {"torch", "vllm", "fastapi"}),
        ("value_server.contract.wire", {"torch", "vllm", "fastapi"}),
    ],
)
def test_import_is_cheap(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*{heavy!r} & sys.modules.keys())"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.split() == []

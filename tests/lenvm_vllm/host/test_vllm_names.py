"""The names of vLLM that the plugin leans on: which one has moved, if one has."""

import ast
import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

from lenvm_vllm import host
from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.host import names as vllm_names
from lenvm_vllm.host.names import FIELDS, METHODS, WHERE
from tests.support.fakes import Server, config, replicas_of

PLUGIN = Path(vllm_names.__file__).parents[1]


@pytest.mark.parametrize("name", WHERE)
def test_it_is_where_we_look(name: str) -> None:
    own = WHERE[name].rpartition(":")[2]
    assert getattr(getattr(vllm_names, name), "__name__", own) == own  # an object has none


def test_one_that_has_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("vllm.config", "vllm.gone"):
        monkeypatch.setitem(WHERE, "VllmConfig", f"{where}:Elsewhere")
        with pytest.raises(ImportError, match=rf"no {where}\.Elsewhere"):
            vllm_names.VllmConfig  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        vllm_names.Other  # noqa: B018


@pytest.mark.parametrize("name", ["apply_top_k_top_p", "apply_all_penalties"])
def test_the_engine_does_not_start_without_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step it would end all requests."""
    EngineRows(config(), replicas_of(Server()))
    monkeypatch.delitem(sys.modules, "lenvm_vllm.host.own_cut")
    monkeypatch.delattr(host, "own_cut")
    monkeypatch.setitem(WHERE, name, f"vllm.gone:{name}")
    with pytest.raises(ImportError, match=rf"no vllm\.gone\.{name}"):
        EngineRows(config(), replicas_of(Server()))


@pytest.mark.parametrize(
    ("owner", "method"), [(owner, method) for owner in METHODS for method in METHODS[owner]]
)
def test_methods_take_what_we_give(owner: str, method: str) -> None:
    function = getattr(getattr(vllm_names, owner), method)
    assert list(inspect.signature(function).parameters) == METHODS[owner][method].split()


@pytest.mark.parametrize(
    ("owner", "field"), [(owner, field) for owner in FIELDS for field in FIELDS[owner].split()]
)
def test_fields_are_there(owner: str, field: str) -> None:
    kind: Any = getattr(vllm_names, owner)
    declared = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else ()
    assert field in declared or hasattr(kind, field)


def test_nothing_of_vllm_is_named_elsewhere() -> None:
    for path in PLUGIN.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert all(name.split(".")[0] != "vllm" for name in names), path.name

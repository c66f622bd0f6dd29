"""The hooks that bring the plugin into vLLM: names, command line, configuration."""

import argparse
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from lenvm_vllm import plugin
from lenvm_vllm.host import served
from lenvm_vllm.plugin import MIDDLEWARE, PROCESSOR, complete_names, register
from tests.support.tiny_llm import tiny_llm


@pytest.mark.parametrize(
    ("names", "full"),
    [
        (None, None),
        ([], []),
        (["lenvm_vllm"], [PROCESSOR]),
        ([PROCESSOR], [PROCESSOR]),
        (["a:B", "lenvm_vllm"], ["a:B", PROCESSOR]),
        (["lenvm_vllm", "a:B", PROCESSOR, "lenvm_vllm"], [PROCESSOR, "a:B"]),
        (["a:B", "a:B", dict], ["a:B", "a:B", dict]),
        (["lenvm_vllm.other:X"], ["lenvm_vllm.other:X"]),
    ],
)
def test_complete_names(names: Any, full: Any) -> None:
    given_names = None if names is None else list(names)
    assert complete_names(names) == full
    assert complete_names(full) == full
    assert names == given_names


@pytest.fixture
def registered() -> None:
    register()


@pytest.mark.usefixtures("registered")
def test_register_is_idempotent() -> None:
    hooks = EngineArgs.from_cli_args.__func__, EngineArgs.create_engine_config
    register()
    assert (EngineArgs.from_cli_args.__func__, EngineArgs.create_engine_config) == hooks


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", [EngineArgs, AsyncEngineArgs])
def test_the_command_line_completes_the_bare_name(kind: Any) -> None:
    args = argparse.Namespace(model="m", logits_processors=["lenvm_vllm"], middleware=["a.B"])
    for _ in range(2):
        made = kind.from_cli_args(args)
        assert type(made) is kind
        assert made.model == "m"
        assert made.logits_processors == [PROCESSOR]
        assert args.middleware == ["a.B", MIDDLEWARE]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("names", [None, [], ["a:B"]])
def test_without_the_plugin_the_command_line_stays(names: Any) -> None:
    args = argparse.Namespace(model="m", logits_processors=names, middleware=[])
    assert AsyncEngineArgs.from_cli_args(args).logits_processors == names
    assert args.middleware == []


@pytest.mark.usefixtures("registered")
def test_without_an_http_server_there_is_no_middleware() -> None:
    args = argparse.Namespace(model="m", logits_processors=["lenvm_vllm"])
    assert EngineArgs.from_cli_args(args).logits_processors == [PROCESSOR]
    assert not hasattr(args, "middleware")


def test_the_middlewares_name() -> None:
    module, name = MIDDLEWARE.rsplit(".", 1)
    assert module == plugin.__name__
    assert hasattr(plugin, name)


@pytest.mark.usefixtures("registered")
def test_the_config_has_the_full_name_and_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a command line."""
    monkeypatch.setattr(served, "config", None)
    args = AsyncEngineArgs(model=str(tiny_llm(tmp_path)), logits_processors=[plugin.BARE])
    made = args.create_engine_config()
    assert made.model_config.logits_processors == [PROCESSOR]
    assert served.config is made

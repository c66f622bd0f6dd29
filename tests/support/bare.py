"""A machine without compilers, as far as a process can tell: all of its programs but those."""

import os
import re
from pathlib import Path

import pytest

from lenvm_vllm.host.machine import COMPILE_OFF

COMPILER = re.compile(r"(.*-)?(cc|c\+\+|gcc|g\+\+|clang|clang\+\+)(-[\d.]+)?")


def hide_compilers(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """From this process and those that it starts. folder: empty, for what they may run."""
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            link = folder / program.name
            if not COMPILER.fullmatch(program.name) and not link.is_symlink():
                link.symlink_to(program)
    patch.setenv("PATH", str(folder))
    for name in ("CC", "CXX", COMPILE_OFF, "TORCHDYNAMO_DISABLE"):
        patch.delenv(name, raising=False)
    # What was compiled before would do without a compiler.
    patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))

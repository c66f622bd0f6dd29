"""What vLLM takes for granted and a bare machine may lack."""

import os
import shutil
import sys
from pathlib import Path

COMPILE_OFF = "TORCH_COMPILE_DISABLE"  # "1" is understood by torch and by vLLM
SHARED_MIB = 160  # of /dev/shm, which vLLM's processes talk through; a container has 64


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def has_bfloat16() -> bool:
    """Whether the device multiplies bfloat16 itself; other CPUs emulate it, slowly."""
    import torch

    return has_gpu() or torch.cpu._is_avx512_bf16_supported()


def has_compiler() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs on a CPU."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", default)) is not None


def compiles() -> bool:
    """Whether functions under torch.compile are compiled; else they run as they are written.

    vLLM has one for logprobs that no flag of its own spares.
    """
    return not any(os.environ.get(name) == "1" for name in (COMPILE_OFF, "TORCHDYNAMO_DISABLE"))


def shared_mib() -> int | None:
    """Free room in /dev/shm; None where there is no such thing."""
    shared = Path("/dev/shm")
    return shutil.disk_usage(shared).free >> 20 if shared.is_dir() else None


def caches() -> list[tuple[str, Path]]:
    """(variable that moves it, folder) of what is written when a model is loaded or served."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return [
        ("HF_HOME", Path(os.environ.get("HF_HOME", home / "huggingface"))),
        ("VLLM_CACHE_ROOT", Path(os.environ.get("VLLM_CACHE_ROOT", home / "vllm"))),
    ]


def is_writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, which need not be there yet."""
    # `Path.exists` raises below a folder that this user may not enter.
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return os.access(there, os.W_OK | os.X_OK)

"""Memory: what a pass has freed, and the way to the device."""

import ctypes
import sys
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Keep it for the next pass, which asks for the same sizes.

    glibc gives large pieces back to the system at once, and every page that it then gets anew
    costs a fault: at 480 rows that is four times the arithmetic of a norm. Elsewhere no effect.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
            mallopt(M_TRIM_THRESHOLD, 1 << 30)


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor; to a GPU through pinned memory, so that nobody waits for the copy."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

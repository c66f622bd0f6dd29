"""Memory: keys and values of all slots, what a pass has freed, and the way to the device."""

import ctypes
import sys
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


class KVPool:
    """Keys and values per layer, (Hkv, slots + 2, D) each; made at a layer's first use.

    Behind the texts' slots: the padding, which stays zero, and a spare one for trials.
    """

    def __init__(self, slots: int) -> None:
        self.padding, self.spare = slots, slots + 1
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's pool; `key` and `value` (1, Hkv, Q, D) tell its shape."""
        if index not in self._layers:
            self._layers[index] = (self._new(key), self._new(value))
        return self._layers[index]

    def _new(self, like: Tensor) -> Tensor:
        return like.new_zeros(like.shape[1], self.spare + 1, like.shape[3])

    @property
    def bytes_per_slot(self) -> int:
        """Over all layers that were used."""
        pools = [pool for layer in self._layers.values() for pool in layer]
        return sum(p.element_size() * p.shape[0] * p.shape[2] for p in pools)


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

"""Ways between the host and the device of the logits that nobody waits for before he has to.

On a CPU each is a plain one. On a GPU an ordinary copy waits for all that was launched before it.
"""

from typing import Any

import torch
from torch import Tensor

_streams: dict[torch.device, Any] = {}  # for copies to the host, one of each device


def uploaded(device: torch.device, *parts: Tensor) -> list[Tensor]:
    """int64 and float64 tensors of the host on `device`, all of them by one copy."""
    if device.type != "cuda":
        return [part.to(device) for part in parts]
    flat = torch.cat([part.reshape(-1).view(torch.int64) for part in parts])
    there = flat.pin_memory().to(device, non_blocking=True)
    own = zip(there.split([part.numel() for part in parts]), parts, strict=True)
    return [mine.view(part.dtype).view(part.shape) for mine, part in own]


class Fetched:
    """A tensor on its way to the host, as it is when this is made.

    It has a stream of its own, so that nothing which is launched later is waited for.
    """

    def __init__(self, there: Tensor) -> None:
        """there: on any device; nobody writes to it any more."""
        self._event: torch.cuda.Event | None = None
        if there.device.type != "cuda":
            self._here = there.cpu()
            return
        stream = _streams.get(there.device)
        if stream is None:
            stream = _streams[there.device] = torch.cuda.Stream(there.device)
        stream.wait_stream(torch.cuda.current_stream(there.device))
        with torch.cuda.stream(stream):
            self._here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
            self._here.copy_(there, non_blocking=True)
            self._event = stream.record_event()
        there.record_stream(stream)

    def here(self) -> Tensor:
        """On the host; waits until it is there."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._here

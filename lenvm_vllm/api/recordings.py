"""Forms with a recording: their text has the length of what was said, so that none can be
asked for. A form is not kept in memory to look for the field; it is watched as it comes."""

import re
from typing import Any

from lenvm_vllm.api.errors import refuse_recording
from lenvm_vllm.target.misplaced import is_meant

_NAME = re.compile(rb'name="?([A-Za-z_-]{1,32})["\r;]')
_LONGEST = 48  # bytes of a name and what is around it


def watched(receive: Any) -> Any:
    """An ASGI `receive` that raises what vLLM answers with HTTP 400 where a form has the field."""
    tail = b""

    async def checked() -> Any:
        nonlocal tail
        message = await receive()
        seen = tail + message.get("body", b"")
        for found in _NAME.finditer(seen):
            if is_meant(name := found[1].decode()):
                refuse_recording(name)
        tail = seen[-_LONGEST:]
        return message

    return checked

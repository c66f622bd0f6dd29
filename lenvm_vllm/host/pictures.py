"""Pictures as vLLM itself loads them: by its own connector, from where it may."""

import asyncio
import base64
from pathlib import Path
from typing import Any


class _File:
    """What the connector hands a picture to, in a thread: its file stays as it is.

    Raises ValueError where it is larger than `most_bytes`.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes

    def get_max_bytes(self) -> int:
        return self._most

    def load_bytes(self, data: bytes) -> bytes:
        if len(data) > self._most:
            raise ValueError(f"more than {self._most} bytes")
        return data

    def load_base64(self, media_type: str, data: str) -> bytes:
        if len(data) > 4 * (self._most // 3 + 1):
            raise ValueError(f"more than {self._most} bytes")
        return self.load_bytes(base64.b64decode(data, validate=True))

    def load_file(self, filepath: Path) -> bytes:
        with filepath.open("rb") as file:
            return self.load_bytes(file.read(self._most + 1))


async def load(url: str, model_config: Any, most_bytes: int) -> bytes:
    """The file of a picture behind a data:, http(s): or file: URL.

    model_config: vLLM's, which says what may be loaded. Raises whatever vLLM's connector raises,
    ValueError for more than `most_bytes`, and TimeoutError.
    """
    from lenvm_vllm.host.names import MEDIA_CONNECTORS, envs

    connector = MEDIA_CONNECTORS.load(
        envs.VLLM_MEDIA_CONNECTOR,
        media_io_kwargs={},
        allowed_local_media_path=model_config.allowed_local_media_path,
        allowed_media_domains=model_config.allowed_media_domains,
    )
    seconds = envs.VLLM_IMAGE_FETCH_TIMEOUT
    async with asyncio.timeout(seconds):  # vLLM itself tries again, for longer
        data: bytes = await connector.load_from_url_async(
            url, _File(most_bytes), fetch_timeout=seconds
        )
    return data


def prepared_plainly(model_config: Any) -> bool:
    """Whether the served model takes pictures, prepared as its own files say: with arguments of
    the operator's they might be others than a value model sees."""
    config = getattr(model_config, "multimodal_config", None)
    if config is None:
        return False
    return not config.mm_processor_kwargs and not config.media_io_kwargs.get("image")

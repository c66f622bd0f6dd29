"""What the tests of the engine share."""

import logging
from collections.abc import Iterator

import pytest

from lenvm_vllm.engine.rows import logger


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    """What the plugin logs; vLLM's loggers do not propagate."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)

"""The vLLM plugin. Importing it loads neither torch nor vLLM."""

from typing import Any

__all__ = ["LenvmLogitsProcessor"]


def __getattr__(name: str) -> Any:
    if name == "LenvmLogitsProcessor":
        from lenvm_vllm.engine.processor import LenvmLogitsProcessor

        return LenvmLogitsProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Lines of production logs, and what they are as tokens of tests.support.tiny, by hand."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

END = 256
# As byte-level tokenizers number them: the printable bytes by their own characters, in order of
# code points, and then the others.
_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {byte: n for n, byte in enumerate([*_SHOWN, *(b for b in range(256) if b not in _SHOWN)])}
USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
CHAT = {"messages": [USER, REPLY]}
REQUEST = {"messages": [USER]}
Import = Callable[..., list[dict[str, Any]]]  # the fixture `imported`


def encoded(text: str) -> list[int]:
    """By hand: the tokens of bytes, and the two special ones."""
    parts = re.split(r"(<\|end\|>|<\|start\|>)", text)
    special = {"<|end|>": [END], "<|start|>": [257]}
    return [token for part in parts for token in special.get(part, plain(part))]


def plain(text: str) -> list[int]:
    return [BYTES[byte] for byte in text.encode()]


IDS = {"prompt_token_ids": [1, 2], "token_ids": [*plain("Hello"), END], "finish_reason": "stop"}


def prompt(*turns: tuple[str, str]) -> list[int]:
    written = "".join(f"<|start|>{role}\n{text}<|end|>" for role, text in turns)
    return encoded(written + "<|start|>assistant\n")


def answer(text: str = "Hello", reason: str | None = "stop", **more: Any) -> dict[str, Any]:
    """A chat completion of a server."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None}
    return {"id": "chatcmpl-1", "choices": [choice | {"finish_reason": reason} | more]}


def write(path: Path, *rows: Any) -> Path:
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def figures(shown: str) -> dict[str, Any]:
    """What the last line of the command says of the logs."""
    found: dict[str, Any] = json.loads(shown.splitlines()[-1])["import"]
    return found

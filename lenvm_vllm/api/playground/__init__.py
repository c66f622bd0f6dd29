"""The playground: one page on vLLM's own port, for people who want to try a length by hand.

Plain files, nothing is loaded from elsewhere. They hold no secret and are served without a key;
the page's requests go to vLLM's guarded routes, with the key that a person types into it.
"""

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from lenvm_vllm.api.asgi import send_whole
from lenvm_vllm.target.rails import bounds_of, landing_span
from lenvm_vllm.target.request import FIELD, LengthTarget, LengthTargetError

PAGE = "/lenvm"
RAILS = f"{PAGE}/rails"  # ?length_target=JSON: where such a text may end

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Playground:
    """ASGI application for PAGE and what lies below it; all files are read once, at the start."""

    def __init__(self) -> None:
        folder = Path(__file__).parent
        files = {f"{PAGE}/{p.name}": p for p in folder.iterdir() if p.suffix in _TYPES}
        files[PAGE] = files.pop(f"{PAGE}/index.html")
        self._files = {path: (_TYPES[p.suffix], p.read_bytes()) for path, p in files.items()}

    def serves(self, method: str | None, path: str) -> bool:
        """path: without a root path, and without a slash at its end."""
        below = path == PAGE or path.startswith(f"{PAGE}/")
        return below and method in ("GET", "HEAD")

    async def __call__(self, scope: Any, path: str, send: Any) -> None:
        """path: as of `serves`."""
        more: dict[str, str] = {}
        if path == PAGE and scope["path"].endswith("/"):
            status, kind, body = 307, _TEXT, b""
            more["location"] = f"..{PAGE}"  # its links count from without the slash
        else:
            status, kind, body = self._look_up(path, scope["query_string"])
        headers = _HEADERS | more | {"content-type": kind}
        await send_whole(send, status, headers, body, shown=scope["method"] != "HEAD")

    def _look_up(self, path: str, query: bytes) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        if path == RAILS:
            return _rails(query)
        if path in self._files:
            return 200, *self._files[path]
        return 404, _TEXT, b"no such file"


def _rails(query: bytes) -> tuple[int, str, bytes]:
    """As `_look_up`: the rails and the landing of a length target, in its unit.

    400 says what is wrong with it, in the words of a request's own.
    """
    asked = parse_qs(query.decode("latin-1")).get(FIELD, [""])[0]
    try:
        target = LengthTarget.parse(asked)
    except LengthTargetError as error:
        return 400, _JSON, json.dumps({"error": {"message": str(error)}}).encode()
    rails, landing = bounds_of(target), landing_span(target)
    told = {"first": rails.first, "last": rails.last, "landing": landing, "unit": target.unit}
    return 200, _JSON, json.dumps(told).encode()

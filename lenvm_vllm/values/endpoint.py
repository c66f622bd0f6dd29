"""How a value server is reached: the arguments of httpx, the same for every client of ours.

url: http://host:port, https://host:port or unix:/path; with the path behind it at which the server
has the model, http://host:port/models/name or unix:/path:/models/name. token: bearer token.
timeout_s: longest wait for any one piece of an answer. tls_ca: PEM file of the authority that
signed an https server's certificate; without one, those that httpx trusts.
"""

import ssl
from pathlib import Path
from typing import Any

import httpx

_UNIX = "unix:"


def http_client(url: str, *, transport: Any = None, **options: Any) -> httpx.Client:
    """transport: in place of a socket's, for tests. Raises OSError for an unreadable `tls_ca`."""
    socket, base = parts(url)
    if socket:
        transport = transport or httpx.HTTPTransport(uds=socket)
    return httpx.Client(transport=transport, **_arguments(base, **options))


def async_http_client(url: str, *, transport: Any = None, **options: Any) -> httpx.AsyncClient:
    """The same for asyncio."""
    socket, base = parts(url)
    if socket:
        transport = transport or httpx.AsyncHTTPTransport(uds=socket)
    return httpx.AsyncClient(transport=transport, **_arguments(base, **options))


def parts(url: str) -> tuple[str, str]:
    """Unix socket, "" where there is none, and base URL."""
    if not url.startswith(_UNIX):
        return "", url
    socket, _, path = url.removeprefix(_UNIX).partition(":/")
    return socket, f"http://localhost/{path}"


def _arguments(
    base: str, token: str | None = None, timeout_s: float = 2.0, tls_ca: Path | None = None
) -> dict[str, Any]:
    return {
        "base_url": base,
        "headers": {"Authorization": f"Bearer {token}"} if token else {},
        "timeout": timeout_s,
        "verify": ssl.create_default_context(cafile=tls_ca) if tls_ca else True,
        "trust_env": False,
    }

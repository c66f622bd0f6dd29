"""How a value server is reached: the arguments of httpx, the same for every client of ours.

url: http://host:port, https://host:port or unix:/path. token: bearer token. timeout_s: longest
wait for any one piece of an answer. tls_ca: PEM file of the authority that signed an https
server's certificate; without one, those that httpx trusts.
"""

import ssl
from pathlib import Path
from typing import Any

import httpx

_UNIX = "unix:"


def http_client(url: str, *, transport: Any = None, **options: Any) -> httpx.Client:
    """transport: in place of a socket's, for tests. Raises OSError for an unreadable `tls_ca`."""
    if url.startswith(_UNIX):
        transport = transport or httpx.HTTPTransport(uds=url.removeprefix(_UNIX))
    return httpx.Client(transport=transport, **_arguments(url, **options))


def async_http_client(url: str, *, transport: Any = None, **options: Any) -> httpx.AsyncClient:
    """The same for asyncio."""
    if url.startswith(_UNIX):
        transport = transport or httpx.AsyncHTTPTransport(uds=url.removeprefix(_UNIX))
    return httpx.AsyncClient(transport=transport, **_arguments(url, **options))


def _arguments(
    url: str, token: str | None = None, timeout_s: float = 2.0, tls_ca: Path | None = None
) -> dict[str, Any]:
    return {
        "base_url": "http://localhost" if url.startswith(_UNIX) else url,
        "headers": {"Authorization": f"Bearer {token}"} if token else {},
        "timeout": timeout_s,
        "verify": ssl.create_default_context(cafile=tls_ca) if tls_ca else True,
        "trust_env": False,
    }

"""Whether a server can listen where it is told to: asked before it loads anything."""

import contextlib
import socket
import ssl
from pathlib import Path


def check_port(host: str, port: int, name: str = "port") -> None:
    """Raises OSError where nobody could listen on a TCP port, naming it; 0 is any free one.

    name: of the option that it comes from.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"host {host!r}: {error.strerror}") from error
    for family, kind, protocol, _, address in found:
        with contextlib.ExitStack() as stack:
            try:
                probe = stack.enter_context(socket.socket(family, kind, protocol))
            except OSError:  # a family that this machine does not have
                continue
            # As servers do: connections that have ended do not count, whoever listens does.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise OSError(f"{name} {port} of {host}: {error.strerror}") from error


def check_socket(path: Path) -> None:
    """Raises OSError where nobody could listen on a Unix socket; one that is left over is free."""
    there = path.is_socket()
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            (probe.connect if there else probe.bind)(str(path))
        except OSError as error:
            if there:
                return
            raise OSError(f"socket {path}: {error.strerror or error}") from error
    if there:
        raise OSError(f"socket {path}: a server listens there")
    path.unlink()


def check_certificate(cert: Path, key: Path) -> None:
    """Raises OSError where a certificate and its private key cannot be read, or do not fit."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"tls_cert {cert} and tls_key {key}: {why}") from error

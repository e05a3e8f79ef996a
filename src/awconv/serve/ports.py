"""Where a server listens."""

from __future__ import annotations

import ipaddress
import socket


def listen(host: str, port: int) -> socket.socket:
    """A socket at a host's port. Who connects before the server has started waits for it.

    Args:
        host: a name or an address of this machine.
        port: 0 takes a free one.

    Raises:
        ValueError: there is no such host, or the port cannot be had.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be from 0 to 65535, got {port}; 0 takes a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host must be a name or an address of this machine, got {host!r}: {error}") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after a server that has just ended
    try:
        bound.bind(address)
        bound.listen()
    except OSError as error:
        bound.close()
        raise ValueError(
            f"port {port} of {host} cannot be had: {error.strerror}; stop what uses it, or give another one, such as "
            f"--port={port + 1 if port < 65535 else 0} (0 takes a free one)"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """How a browser names a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def names_of(bound: socket.socket, host: str) -> frozenset[str] | None:
    """How requests to a socket that only this machine reaches may call it, as in the header Host; else None: by any.

    Args:
        bound: the socket.
        host: what it was asked to listen to.
    """
    if not is_local(bound):
        return None
    address = bound.getsockname()[0]
    given = (f"[{name}]" if ":" in name else name for name in (address, host.lower()))
    return frozenset({"localhost", "127.0.0.1", "[::1]", *given})

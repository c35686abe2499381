"""Ports of this machine that nobody uses, so that two runs live side by side."""

from __future__ import annotations

import secrets
import socket
import threading

_LOWEST, _HIGHEST = 10240, 32767  # below those that systems give to outgoing connections
_TRIES = 1000
_lock = threading.Lock()
_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Distinct free ports of the loopback interface. Someone else may take one before it is used: bind at once."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


def own_ports(count: int) -> list[int]:
    """Free ports that this process gives to nobody else, now or later, from whichever thread they are asked for.

    They are drawn at random from where no outgoing connection comes from: for children that take a second to bind.

    Raises:
        OSError: If none is free.
    """
    with _lock:
        return [_own_port() for _ in range(count)]


def _own_port() -> int:
    for _ in range(_TRIES):
        port = _LOWEST + secrets.randbelow(_HIGHEST - _LOWEST + 1)
        if port in _given:
            continue
        with socket.socket() as opened:
            try:
                opened.bind(("127.0.0.1", port))
            except OSError:  # somebody has it
                continue
        _given.add(port)
        return port
    raise OSError(f"a port between {_LOWEST} and {_HIGHEST} must be free, got none in {_TRIES} tries.")

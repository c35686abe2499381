"""Ports of this machine that nobody uses, so that two runs live side by side."""

from __future__ import annotations

import socket


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

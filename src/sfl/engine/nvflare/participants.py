"""Server and sites of a federation of this machine, as processes that their kits start."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sfl.engine.nvflare.federation import SERVER
from sfl.engine.nvflare.provision import service_command

__all__ = ["listens", "start"]

_START = 60.0  # seconds for which the sites wait for a server that does not listen yet
_LOOK = 0.1


def start(
    kits: Path, sites: Sequence[str], port: int, log: Callable[[str], Path]
) -> dict[str, subprocess.Popen[bytes]]:
    """Start the server, and the sites once it listens: FLARE's client gives up after 15 seconds without a server, and a
    job would wait for it for good.

    A server that has ended, or takes longer than a minute, holds nobody up: that it is missing is said elsewhere.

    Args:
        kits: The folder that holds a kit under each participant's name.
        sites: Their names.
        port: On which the server will listen.
        log: The file that a participant's words are added to, by its name.

    Returns:
        The processes, by name.

    Raises:
        EngineError: If a kit is none.
    """

    def begun(name: str) -> subprocess.Popen[bytes]:
        with log(name).open("ab") as output:
            command = service_command(kits / name, sys.executable)
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)

    server = begun(SERVER)
    deadline = time.monotonic() + _START
    while server.poll() is None and not listens(port) and time.monotonic() < deadline:
        time.sleep(_LOOK)
    return {SERVER: server, **{name: begun(name) for name in sites}}


def listens(port: int) -> bool:
    """Whether anybody listens on a port of this machine."""
    try:
        socket.create_connection(("localhost", port), timeout=1.0).close()
    except OSError:
        return False
    return True

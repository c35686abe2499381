"""A training script's process, seen from inside: it finds its site, and ends with it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading

from sfl.client import wire
from sfl.client.alias import ScriptImports, seed_numpy, seed_python
from sfl.client.session import ScriptResult, ScriptTask, Session
from sfl.errors import ClientApiError


def begin() -> None:
    """Called as the interpreter starts, before the script: imports, random state, and a watch over the site."""
    address = wire.Address.from_environment()
    sys.meta_path.insert(0, ScriptImports(address.site, rank=os.environ.get("LOCAL_RANK")))
    seed_python(address.site.seed)
    seed_numpy(address.site.seed)
    try:
        connection = wire.connect(address, "watch")
    except OSError as error:  # an error would be printed, and the script would run for nobody
        sys.stderr.write(f"a training script must reach its site, got: {error}. The site has ended.\n")
        sys.stderr.flush()
        os._exit(1)
    watch = threading.Thread(target=_end_with, args=(connection,), daemon=True, name="site-watch")
    watch.start()


def _end_with(connection: socket.socket) -> None:
    """Wait until the site's end of the connection is gone, then take this process and its group with it."""
    try:
        while connection.recv(1):
            pass
    except OSError:
        pass  # gone is gone, whichever way the system says it
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def connect(rank: str) -> Session:
    """The session of this process; on a rank other than 0 it exchanges nothing.

    Raises:
        ClientApiError: If the site cannot be reached.
    """
    address = wire.Address.from_environment()
    if rank != "0":
        return Session(address.site, None)
    try:
        return Session(address.site, _SocketLink(wire.connect(address, "talk")))
    except OSError as error:
        raise ClientApiError(f"init() must reach its site, got: {error}. Its process may be gone.") from error


class _SocketLink:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def next_task(self) -> ScriptTask | None:
        """Say that the last task is done, and wait for one."""
        try:
            wire.send(self._connection, "idle")
            kind, body = wire.receive(self._connection)
        except (EOFError, ConnectionError):
            return None
        if kind != "task":
            return None
        return ScriptTask(**body)

    def send(self, result: ScriptResult) -> None:
        """Send what the script made."""
        try:
            wire.send(self._connection, "result", wire.result_tree(result))
        except ConnectionError as error:
            raise ClientApiError(f"send() must reach its site, got: {error}. Its process may be gone.") from error

"""Messages between a site and a training script in a process of its own: a loopback connection, no pickle.

A process first says its token; nothing else is read of one that does not know it. Then come frames: two lengths
(8 bytes each, big-endian), a JSON text and the arrays as safetensors. Nothing has a name in the file system, so nothing
can be left there, whoever is killed first.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
from dataclasses import asdict, dataclass
from typing import Any

from sfl.client.session import ScriptResult, ScriptSite, ScriptTask
from sfl.errors import EngineError
from sfl.io.tree import pack_tree, unpack_tree

VARIABLE = "_SFL_CLIENT"  # not SFL_…: those name options
_LENGTHS = struct.Struct(">QQ")
_MOST_JSON = 1 << 30
_TOKEN = 64  # characters


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a script finds its site: what the environment variable ``_SFL_CLIENT`` says, as JSON.

    Attributes:
        port: Where the site listens, on the loopback device.
        token: What a process must say first; the environment of a process can be read by its own user alone.
        site: Whose script it is.
    """

    port: int
    token: str
    site: ScriptSite

    def to_text(self) -> str:
        """As the environment carries it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> Address:
        """The address that this process was started with.

        Raises:
            EngineError: If it is not whole.
        """
        try:
            said = json.loads(os.environ[VARIABLE])
            return cls(port=said["port"], token=said["token"], site=ScriptSite(**said["site"]))
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{VARIABLE} must be what a site wrote, got: {error!r}.") from error


def listen(site: ScriptSite) -> tuple[socket.socket, Address]:
    """A socket for the processes of one script, and the address that they are told."""
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, Address(port=listener.getsockname()[1], token=secrets.token_hex(_TOKEN // 2), site=site)


def connect(address: Address, kind: str) -> socket.socket:
    """A connection to the site, introduced as ``"talk"`` (exchanges models) or ``"watch"`` (only sees its end).

    Raises:
        OSError: If the site is not there.
    """
    connection = socket.create_connection(("127.0.0.1", address.port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(address.token.encode())
    send(connection, kind)
    return connection


def accept(listener: socket.socket, address: Address, timeout: float = 5.0) -> tuple[socket.socket, str]:
    """Take the next connection; its kind is ``""`` if it does not say the token within ``timeout`` seconds."""
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(timeout)
    try:
        said = _exactly(connection, _TOKEN)
        kind = receive(connection)[0] if secrets.compare_digest(said, address.token.encode()) else ""
    except (EOFError, OSError, EngineError):
        kind = ""
    connection.settimeout(None)
    return connection, kind


def send(connection: socket.socket, kind: str, tree: Any = None) -> None:
    """Send one message.

    Raises:
        ConnectionError: If the other side is gone.
    """
    skeleton, tensors = pack_tree({"kind": kind, "body": tree})
    connection.sendall(_LENGTHS.pack(len(skeleton), len(tensors)) + skeleton)
    connection.sendall(tensors)


def receive(connection: socket.socket) -> tuple[str, Any]:
    """The next message: its kind and its body.

    Raises:
        EOFError: If the other side is gone.
        EngineError: If what arrives is no frame.
    """
    lengths = _LENGTHS.unpack(_exactly(connection, _LENGTHS.size))
    if lengths[0] > _MOST_JSON:
        raise EngineError(f"a frame must have a JSON text below {_MOST_JSON} bytes, got {lengths[0]}.")
    skeleton, tensors = (_exactly(connection, length) for length in lengths)
    message = unpack_tree(skeleton, tensors)
    if not (isinstance(message, dict) and isinstance(message.get("kind"), str)):
        raise EngineError(f"a message must have a kind, got {type(message).__name__}.")
    return message["kind"], message.get("body")


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        try:
            count = connection.recv_into(view[got:])
        except ConnectionError as error:
            raise EOFError from error
        if count == 0:
            raise EOFError
        got += count
    return bytes(data)


def task_tree(task: ScriptTask) -> dict[str, Any]:
    """A task as it travels."""
    names = ("name", "round", "rounds", "parameters", "terms")
    return {name: getattr(task, name) for name in names}


def result_tree(result: ScriptResult) -> dict[str, Any]:
    """A result as it travels."""
    return {name: getattr(result, name) for name in ("parameters", "is_diff", "metrics", "steps", "travelled")}

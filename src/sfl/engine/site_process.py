"""A process in which sites live on between messages, for engines whose own processes come and go.

Flower starts a process for every message of a deployment, and its simulation loses a worker for good when a site's code
kills it. So what answers a message there only passes it on to a process of ours, which keeps the model, the data and
what else took long to make, and may die without taking the engine's process along:
``python -m sfl.engine.site_process FOLDER KEY PID`` serves until the process PID is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sfl.core import sparse
from sfl.core.task import FIT, Reply, Status
from sfl.core.unpack import is_packed
from sfl.engine.holding import Holding
from sfl.engine.host import SiteHost
from sfl.engine.launch import Launch
from sfl.engine.wire import pack_reply, unpack_task
from sfl.errors import EngineError
from sfl.io.tree import write_text
from sfl.types import Parameters

_START = 60.0  # seconds that a process gets to begin
_LOOK = 0.05
_TRIES = 4
_BEGUN, _END = b"begun", b""  # no site has an empty name


class SiteProcess:
    """This side of a process of sites, found or started when it is needed.

    Args:
        launch: The run.
        key: Which of its processes.
        keeper: Process id of whoever must be alive for it to go on.
    """

    def __init__(self, launch: Launch, key: str, keeper: int) -> None:
        self._launch, self._key, self._keeper = launch, key, keeper
        self._connection: Connection | None = None

    def run(self, site: str, text: str, arrays: Parameters) -> tuple[str, Parameters]:
        """Pass a task on, and the reply back. If the process dies over it, the reply says so."""
        reason = f"{site}: its process died before it came to the task, {_TRIES} times"
        for _ in range(_TRIES):
            has_begun = False
            try:
                connection = self._connection = self._connection or self._connect()
                for part in (site.encode(), text.encode(), save(arrays)):
                    connection.send_bytes(part)
                has_begun = connection.recv_bytes() == _BEGUN
                return connection.recv_bytes().decode(), load(connection.recv_bytes())
            except EngineError as error:
                reason = f"{site}: {error}"
                break
            except (EOFError, OSError):
                self._connection = None
            if has_begun:  # else it was another site's task that it died of
                reason = f"{site}: its process died; it starts anew with the next task"
                break
        return pack_reply(_exchange_of(text), Reply(site, Status.FAILED, reason=reason))

    def end(self) -> None:
        """End the process, if there is one."""
        self._connection = None
        try:
            port, secret = _Door(self._launch, self._key).read()
            with Client(("127.0.0.1", port), authkey=secret) as connection:
                connection.send_bytes(_END)
                connection.recv_bytes()  # until it is gone
        except (OSError, ValueError, EOFError, AuthenticationError):
            return

    def _connect(self) -> Connection:
        """A connection to the process, which one of those who ask for it at once starts."""
        with (self._launch.folder / f"door-{self._key}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for attempt in range(2):
                try:
                    port, secret = _Door(self._launch, self._key).read()
                    return _prompt(Client(("127.0.0.1", port), authkey=secret))
                except (OSError, ValueError, EOFError, AuthenticationError):
                    if attempt == 0:
                        self._start()
        raise EngineError("the process of its site must answer, got no connection. Its log is in the run's logs.")

    def _start(self) -> None:
        door = _Door(self._launch, self._key)
        door.path.unlink(missing_ok=True)
        log = Path(self._launch.read_settings()["logs"]) / f"sites-{self._key}.log"
        command = [sys.executable, "-m", __name__, str(self._launch.folder), self._key, str(self._keeper)]
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + _START
        while not door.path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise EngineError(f"the process of its site must start, got exit code {process.poll()}. See {log}.")
            time.sleep(_LOOK)
        _started[:] = [*(one for one in _started if one.poll() is None), process]


_started: list[subprocess.Popen[bytes]] = []
"""Held, so that those of them that have ended are waited for."""


def home_of(launch: Launch, site: str) -> tuple[str, int]:
    """Which process of sites answers for a site, and for whom it lives.

    Where one process runs the whole engine, sites share as many processes as may work side by side, each always the
    same one. Elsewhere a site has a process to itself, which lives as long as the one that asks.
    """
    settings = launch.read_settings()
    keeper = int(settings.get("keeper", 0))
    if not keeper:
        return site, os.getpid()
    return str(list(settings["names"]).index(site) % int(settings["workers"])), keeper


class _Door:
    """The file that says where a process of sites listens, readable by this user alone."""

    def __init__(self, launch: Launch, key: str) -> None:
        self.path = launch.folder / f"door-{key}.json"

    def write(self, port: int, secret: bytes) -> None:
        self.path.with_name(self.path.name + ".partial").touch(mode=0o600)
        write_text(self.path, json.dumps({"port": port, "secret": secret.hex()}))

    def read(self) -> tuple[int, bytes]:
        said = json.loads(self.path.read_text(encoding="utf-8"))
        return int(said["port"]), bytes.fromhex(said["secret"])


def serve(launch: Launch, key: str, keeper: int) -> None:
    """Answer messages, whoever brings them, until the keeper is gone."""
    threading.Thread(target=_end_with, args=(keeper,), daemon=True, name="keeper-watch").start()
    host, turn = SiteHost(launch.host(_place(launch, key))), _Turn()
    holding = Holding(alone=key in launch.read_settings()["names"])
    if idle := float(launch.read_settings().get("idle", 0)):
        threading.Thread(target=turn.end_after, args=(idle,), daemon=True, name="idle-watch").start()
    secret = secrets.token_bytes(32)
    with Listener(("127.0.0.1", 0), authkey=secret) as listener:
        _Door(launch, key).write(int(listener.address[1]), secret)
        while True:
            try:
                connection = _prompt(listener.accept())
            except (OSError, EOFError, AuthenticationError):  # somebody without the secret, or who has gone at once
                continue
            threading.Thread(target=_converse, args=(connection, host, holding, turn), daemon=True).start()


def _place(launch: Launch, key: str) -> int:
    """The place of a process among those of its run: its number, or that of the one site it is for."""
    names = list(launch.read_settings()["names"])
    return names.index(key) if key in names else int(key)


def _prompt(connection: Connection) -> Connection:
    """The connection without Nagle's wait: a message is three writes, and the second would wait 40 ms for an answer."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class _Turn:
    """Sites of this process work one at a time, whoever asks."""

    def __init__(self) -> None:
        self._lock, self._last = threading.Lock(), time.monotonic()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.note()
        self._lock.release()

    def note(self) -> None:
        """Somebody is there."""
        self._last = time.monotonic()

    def end_after(self, idle: float) -> None:
        """End this process when nobody has had a turn for so long."""
        while True:
            time.sleep(max(0.0, self._last + idle - time.monotonic()))
            with self._lock:
                if time.monotonic() - self._last >= idle:
                    os._exit(0)


def _converse(connection: Connection, host: SiteHost, holding: Holding, turn: _Turn) -> None:
    """Answer one process of the engine."""
    with connection:
        while True:
            try:
                site = connection.recv_bytes()
                if site == _END:
                    os._exit(0)
                text, arrays = connection.recv_bytes(), connection.recv_bytes()
            except (EOFError, OSError):
                return
            try:
                turn.note()
                passed = _passed(holding, site.decode(), text.decode(), arrays)
                if passed is not None:  # a piece, which waits for nobody's work
                    connection.send_bytes(_BEGUN)
                    _send(connection, passed)
                    continue
                with turn:  # until the answer is out: the next site's task may be the end of this process
                    connection.send_bytes(_BEGUN)
                    _send(connection, _answer(host, holding, site.decode(), text.decode(), arrays))
            except OSError:
                return


def _send(connection: Connection, answer: tuple[str, bytes]) -> None:
    connection.send_bytes(answer[0].encode())
    connection.send_bytes(answer[1])


def _passed(holding: Holding, site: str, text: str, arrays: bytes) -> tuple[str, bytes] | None:
    """The answer to a message that carries, or asks for, a piece; ``None`` if it is another."""
    said = _said(text)
    try:
        passed = holding.passed(site, said, load(arrays) if "load" in said else {})
    except (EngineError, SafetensorError) as error:
        return _failed(site, text, error)
    return None if passed is None else (passed[0], save(passed[1]))


def _answer(host: SiteHost, holding: Holding, site: str, text: str, arrays: bytes) -> tuple[str, bytes]:
    """The reply to one task, whatever it is."""
    try:
        holding.before_work()
        order = unpack_task(text, holding.parameters(site, _said(text), load(arrays)), site)
    except (EngineError, SafetensorError) as error:
        return _failed(site, text, error)
    reply = host.run(site, order)
    if reply.update is not None and order.task.name == FIT and not is_packed(reply.update.delta):
        reply = replace(reply, update=replace(reply.update, delta=sparse.packed(reply.update.delta)))
    answer, delta = holding.kept(site, _said(text), *pack_reply(order.exchange, reply))
    return answer, save(dict(delta))


def _failed(site: str, text: str, error: Exception) -> tuple[str, bytes]:
    return pack_reply(_exchange_of(text), Reply(site, Status.FAILED, reason=str(error)))[0], save({})


def _said(text: str) -> dict[str, Any]:
    """What a message says; nothing if it is none of ours."""
    try:
        said: object = json.loads(text)
    except ValueError:
        return {}
    return {str(name): value for name, value in said.items()} if isinstance(said, dict) else {}


def _exchange_of(text: str) -> int:
    try:
        return int(json.loads(text)["exchange"])
    except (ValueError, KeyError, TypeError):
        return -1


def _end_with(keeper: int) -> None:
    while psutil.pid_exists(keeper) and psutil.Process(keeper).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    serve(Launch(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]))

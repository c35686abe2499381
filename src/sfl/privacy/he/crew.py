"""Processes that encrypt and decrypt side by side: TenSEAL holds Python's lock while it computes, so threads cannot."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import numpy as np

from sfl.errors import ProtocolError
from sfl.privacy.he.cipher import Cipher
from sfl.privacy.he.packing import framed, parts_of
from sfl.privacy.he.scheme import Scheme
from sfl.types import Array

__all__ = ["Crew", "cores", "serve"]

_WORTH = 16  # blocks: 4 million numbers, which take a second; to start a process takes half of one
_MOST = 8  # processes
_ENCRYPT, _DECRYPT, _DONE, _WRONG = b"e", b"d", b"+", b"-"


def cores() -> int:
    """How many processes may compute at once here, on a machine that is a site's own."""
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(free, _MOST)


class Crew:
    """Encrypts or decrypts the blocks of one model, in their order, in so many processes as are worth it.

    Args:
        cipher: With the keys that it takes.
        size: Processes that may compute at once.
        blocks: How many blocks there will be; few are done in this process.

    Raises:
        ProtocolError: If one of the processes ends before its work is done.
    """

    def __init__(self, cipher: Cipher, size: int, blocks: int) -> None:
        self._cipher = cipher
        count = size if size > 1 and blocks >= _WORTH else 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        self._threads = ThreadPoolExecutor(count) if count else None
        for _ in range(count):
            self._start()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            for process in self._processes:
                process.kill()  # nobody waits for its answer
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().close()  # the end of its work, to the process at the other side
        for process in self._processes:
            process.wait()

    def encrypted(self, blocks: Iterable[Array], scale_bits: int) -> Iterator[Array]:
        """Of each block of numbers, float64, (rows, slots), its ciphertexts, framed."""

        def asked(numbers: Array) -> bytes:
            return _ENCRYPT + bytes([scale_bits]) + numbers.tobytes()

        for data in self._mapped(blocks, asked, lambda rows: _encrypted(self._cipher, rows, scale_bits)):
            yield np.frombuffer(data, np.uint8)

    def decrypted(self, blocks: Iterable[tuple[Array, int]]) -> Iterator[Array]:
        """Of each block of ciphertexts, framed, and the number of them: its numbers, float64, flat.

        Raises:
            ProtocolError: If there are other ones.
        """

        def asked(block: tuple[Array, int]) -> bytes:
            return _DECRYPT + bytes([block[1]]) + np.ascontiguousarray(block[0]).tobytes()

        for data in self._mapped(blocks, asked, lambda block: _decrypted(self._cipher, *block)):
            yield np.frombuffer(data, np.float64).copy()

    def _mapped(
        self, blocks: Iterable[Any], asked: Callable[[Any], bytes], here: Callable[[Any], bytes]
    ) -> Iterator[bytes]:
        """What becomes of each block. Two of a process's are on their way at a time, so that memory stays small."""
        if self._threads is None:
            yield from map(here, blocks)
            return
        waiting: deque[Future[bytes]] = deque()
        for block in blocks:
            waiting.append(self._threads.submit(self._ask, asked(block)))
            if len(waiting) >= 2 * len(self._processes):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _ask(self, message: bytes) -> bytes:
        connection = self._idle.get()  # there are as many threads as processes
        try:
            connection.send_bytes(message)
            answer = connection.recv_bytes()
        except (EOFError, OSError):
            raise ProtocolError(
                "a process that encrypts must answer, got none: it was ended from outside, perhaps for want of memory."
            ) from None
        finally:
            self._idle.put(connection)
        if answer[:1] == _WRONG:
            raise ProtocolError(answer[1:].decode())
        return answer[1:]

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            self._processes.append(
                subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, close_fds=True)
            )
        connection = Connection(ours.detach())
        connection.send_bytes(json.dumps(asdict(self._cipher.scheme)).encode())
        connection.send_bytes(self._cipher.data)  # with the keys: a socket that no other process has
        self._idle.put(connection)


def serve(connection: Connection) -> None:
    """The other side: answer until the first is gone, however it went."""
    try:
        scheme = json.loads(connection.recv_bytes())
        cipher = Cipher(Scheme(scheme["degree"], tuple(scheme["moduli"]), scheme["symmetric"]), connection.recv_bytes())
        while True:
            connection.send_bytes(_answer(cipher, connection.recv_bytes()))
    except (EOFError, OSError):
        return


def _answer(cipher: Cipher, message: bytes) -> bytes:
    kind, figure, data = message[:1], message[1], message[2:]
    try:
        if kind == _ENCRYPT:
            rows = np.frombuffer(data, np.float64).reshape(-1, cipher.scheme.slots)
            return _DONE + _encrypted(cipher, rows, figure)
        return _DONE + _decrypted(cipher, np.frombuffer(data, np.uint8), figure)
    except ProtocolError as error:
        return _WRONG + str(error).encode()


def _encrypted(cipher: Cipher, rows: Array, scale_bits: int) -> bytes:
    return framed([cipher.encrypted(row, scale_bits) for row in rows]).tobytes()


def _decrypted(cipher: Cipher, array: Array, count: int) -> bytes:
    return np.concatenate([cipher.decrypted(part) for part in parts_of(array, count)]).tobytes()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    serve(Connection(int(sys.argv[1])))

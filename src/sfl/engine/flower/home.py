"""How a run on a SuperLink of others comes home: as lines of the ServerApp's log, all that Flower hands to a submitter.

Events are lines that anybody with access to the log may read, as any ServerApp's output. What the run made is sealed
for the submitter, so that neither the SuperLink's console nor another account sees parameters in it.
"""

from __future__ import annotations

import base64
import inspect
import io
import json
import sys
import tarfile
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from types import FunctionType
from typing import cast

from sfl.engine.flower.carried import MOST, RESULT
from sfl.engine.launch import Launch
from sfl.privacy.sealed import Seal

EVENT, PART = "sfl-event", "sfl-part"
PIECE = 48 << 10  # bytes in a part, before it is sealed
LEFT = "left-out.json"
_BATCH, _PAUSE = 128, 0.05  # parts between two waits for Flower to upload them, and between two looks for that
_BLIND = 0.25  # the wait where nobody says what is uploaded
_STUCK = 60.0  # seconds without an upload after which none is waited for
_LOOK = 0.1


@contextmanager
def telling(launch: Launch) -> Generator[None]:
    """Write each event of a launch to standard output as it happens."""
    over = threading.Event()
    thread = threading.Thread(target=_tell, args=(launch.events, over), name="events")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _tell(events: Path, over: threading.Event) -> None:
    offset = number = 0
    while True:
        last = over.wait(_LOOK)
        if events.exists():
            with events.open("rb") as file:
                file.seek(offset)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            offset += len(whole)
            for line in whole.decode().splitlines():
                _write(EVENT, f"{number}", line)
                number += 1
        if last:
            return


def bring_home(launch: Launch) -> None:
    """Write what the run made to the log, in sealed parts: the outcome, the last state, the run's folder."""
    packed = launch.folder / "home.tar"
    _pack(launch, packed)
    try:
        count = -(-packed.stat().st_size // PIECE)
        seal, log = Seal(bytes.fromhex(launch.read_settings()["reader"]), count), _Log()
        with packed.open("rb") as file:
            for number in range(count):
                log.write(PART, f"{number}/{count}", base64.b64encode(seal.close(file.read(PIECE))).decode())
                if number % _BATCH == _BATCH - 1:
                    log.wait()
        log.wait()
    finally:
        packed.unlink()


class _Log:
    """The ServerApp's log: what is written to standard output, or past it, where Flower takes it up for the upload.

    Flower uploads from a queue, ends three seconds after the app whatever is left in it, and writes all on the
    SuperLink's console, too: parts are put into the queue itself, as fast as they go.
    """

    def __init__(self) -> None:
        try:
            found = inspect.getclosurevars(cast("FunctionType", sys.stdout.write)).nonlocals.get("log_queue")
        except TypeError:
            found = None
        self._queue = cast("Queue[str | None] | None", found) if isinstance(found, Queue) else None

    def write(self, kind: str, number: str, text: str) -> None:
        """Write one line."""
        if self._queue is None:
            _write(kind, number, text)
        else:
            self._queue.put(_line(kind, number, text))

    def wait(self) -> None:
        """Wait until what was written is on its way."""
        if self._queue is None:
            time.sleep(_BLIND)
            return
        deadline = time.monotonic() + _STUCK
        while not self._queue.empty() and time.monotonic() < deadline:
            time.sleep(_PAUSE)


def _pack(launch: Launch, packed: Path) -> None:
    """Pack what comes home, and the names of what is too much."""
    size, left = 0, list[str]()
    with tarfile.open(packed, mode="w", dereference=True) as tar:  # files alone: links are not taken at home
        for path, name in _files(launch):
            more = path.stat().st_size
            if size + more <= MOST:
                tar.add(path, name)
                size += more
            else:
                left.append(name)
        text = json.dumps(left).encode()
        about = tarfile.TarInfo(LEFT)
        about.size = len(text)
        tar.addfile(about, io.BytesIO(text))


def _files(launch: Launch) -> Iterator[tuple[Path, str]]:
    """What comes home, what matters most first."""
    for path in (launch.outcome, launch.final, launch.events):
        if path.exists():
            yield path, path.name
    made = Path(launch.read_settings()["out"])
    files = sorted(path for path in made.rglob("*") if path.is_file())
    states = [path for path in files if "checkpoints" in path.parts]
    for path in [*(path for path in files if path not in states), *reversed(states)]:
        yield path, f"{RESULT}/{path.relative_to(made)}"


def _write(kind: str, number: str, text: str) -> None:
    """One line in one write: other threads write, too, and may be in the middle of a line of theirs."""
    sys.stdout.write(_line(kind, number, text))


def _line(kind: str, number: str, text: str) -> str:
    return f"\n{kind} {number} {text}\n"

"""How a run on a SuperLink of others comes home: as lines of the ServerApp's log, all that Flower hands to a submitter.

Events are lines that anybody with access to the log may read, as any ServerApp's output. What the run made is sealed
for the submitter, so that neither the SuperLink's console nor another account sees parameters in it.
"""

from __future__ import annotations

import base64
import io
import sys
import tarfile
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from sfl.engine.flower.carried import RESULT
from sfl.engine.flower.sealed import seal
from sfl.engine.launch import Launch

EVENT, PART = "sfl-event", "sfl-part"
_MOST = 64 << 20  # bytes of results that a log is asked to carry
_LINE = 48 << 10  # bytes in a line, before base64
_BATCH, _PAUSE = 64, 0.25  # lines between two pauses, so that Flower uploads them in pieces, and how long one is
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
    """Write what the run made to standard output, sealed: the outcome, the last state, the run's folder."""
    sealed = seal(_packed(launch), bytes.fromhex(launch.read_settings()["reader"]))
    pieces = [sealed[start : start + _LINE] for start in range(0, len(sealed), _LINE)]
    for number, piece in enumerate(pieces):
        _write(PART, f"{number}/{len(pieces)}", base64.b64encode(piece).decode())
        if number % _BATCH == _BATCH - 1:
            time.sleep(_PAUSE)


def _packed(launch: Launch) -> bytes:
    file = io.BytesIO()
    size = 0
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path, name in _files(launch):
            size += path.stat().st_size
            if size <= _MOST:
                tar.add(path, name)
            else:
                size -= path.stat().st_size
    return file.getvalue()


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
    sys.stdout.write(f"\n{kind} {number} {text}\n")

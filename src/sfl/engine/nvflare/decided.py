"""Ending a federation of this machine's own as soon as its one job is decided.

FLARE takes about ten seconds to end a job whose server is done, and its processes as long again. What they have is the
run's own, and nobody needs it once the outcome is written: by then sites have let their clients go.
"""

from __future__ import annotations

import os
import sys
import threading
import time

import psutil

from sfl.engine.launch import Launch

__all__ = ["end_children", "end_once_decided"]

_GLANCE = 0.1  # seconds between two looks at a file


def end_children() -> None:
    """Kill every process that this one has started, and what those have."""
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def end_once_decided(launch: Launch) -> None:
    """End this process and its children once the outcome of ``launch`` is there, whatever it waits for by then."""
    threading.Thread(target=_end, args=(launch,), name="end-once-decided", daemon=True).start()


def _end(launch: Launch) -> None:
    while not launch.outcome.exists():
        time.sleep(_GLANCE)
    sys.stdout.flush()
    sys.stderr.flush()
    end_children()
    os._exit(0)  # FLARE's simulator waits for threads of its own, and what went wrong is in the outcome

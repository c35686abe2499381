"""Flower's waits for work, shorter. Only the standard library: it is imported before Flower is."""

from __future__ import annotations

import sys
import time

LOOPS = ("flwr.supernode.", "flwr.supercore.superexec.")
"""Modules that sleep between two looks for work, for one to three seconds; no switch of Flower's changes that."""


def shorten(pause: float) -> None:
    """In this process, let those modules sleep for ``pause`` seconds at most, and no others."""
    sleep = time.sleep

    def shorter(seconds: float) -> None:
        caller = str(sys._getframe(1).f_globals.get("__name__"))  # pyright: ignore[reportPrivateUsage]
        sleep(min(seconds, pause) if f"{caller}.".startswith(LOOPS) else seconds)

    time.sleep = shorter

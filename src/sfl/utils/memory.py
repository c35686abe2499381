"""Memory given back to the system."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["return_large", "trim"]

_MMAP_THRESHOLD = -3  # of mallopt(3)
_LARGE = 1 << 20


def return_large() -> None:
    """From now on give each block of 1 MiB or more back as soon as it is free, where the C library can.

    glibc does so only until the first such block is free, and from then on keeps as many as were ever in use at once,
    in each arena: for a process that passes messages of some MiB on, more than what it works with.
    """
    found = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if found is not None:
        found(_MMAP_THRESHOLD, _LARGE)


def trim() -> None:
    """Give memory that nothing is in any more back to the system, where the C library can."""
    found = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if found is not None:
        found(0)

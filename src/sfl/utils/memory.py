"""Memory given back to the system."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["trim"]


def trim() -> None:
    """Give memory that nothing is in any more back to the system, where the C library can."""
    found = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if found is not None:
        found(0)

"""Methods that are called at named moments: a misspelled one would never be called, and nobody would know."""

from __future__ import annotations

import difflib


def check_moments(subclass: type, base: type) -> None:
    """Every ``on_...`` method of a subclass must be one of its base.

    Raises:
        TypeError: Naming the nearest moment.
    """
    moments = [name for name in vars(base) if name.startswith("on_")]
    for name in vars(subclass):
        if name.startswith("on_") and name not in moments:
            near = difflib.get_close_matches(name, moments, n=1) or [", ".join(moments)]
            raise TypeError(f"{subclass.__name__}.{name} must be named after a moment. Did you mean {near[0]}?")

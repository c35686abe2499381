"""What a ``sitecustomize`` of ours does last: let the one run that would have run without it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path


def make_way(hook: str) -> None:
    """Take a hook's folder off the path, and run the ``sitecustomize`` that lies behind it, if there is one.

    Args:
        hook: File of the hook.
    """
    folder = str(Path(hook).parent)
    sys.path[:] = [entry for entry in sys.path if entry != folder]
    own = sys.modules.pop("sitecustomize", None)
    try:
        import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
        if own is not None:
            sys.modules["sitecustomize"] = own

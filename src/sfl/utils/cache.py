"""The user's cache: the one place beside a run's folder where SFL leaves anything."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["keep_torch_in_cache", "user_cache"]


def user_cache() -> Path:
    """SFL's own folder in it: ``$XDG_CACHE_HOME/sfl``, by default ``~/.cache/sfl``. It need not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".cache") / "sfl"


def keep_torch_in_cache() -> None:
    """Torch's compiler makes a folder among the temporary ones when it is only imported, and leaves it there."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache() / "torchinductor"))

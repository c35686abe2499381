"""Which of the modules that a job names are the user's own, and have to travel with it."""

from __future__ import annotations

import site
import sys
import sysconfig
from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path

from sfl.errors import ConfigError


def own_modules(names: Iterable[str]) -> dict[str, Path]:
    """Top-level modules that are neither installed nor part of Python: name to file, or to a package's folder.

    Args:
        names: Dotted names of modules that a job names.

    Raises:
        ConfigError: If one cannot be found.
    """
    found: dict[str, Path] = {}
    for top in sorted({name.partition(".")[0] for name in names}):
        if top in sys.stdlib_module_names or top in sys.builtin_module_names or top == "sfl":
            continue
        spec = PathFinder.find_spec(top, _places())
        if spec is None or spec.origin is None:
            raise ConfigError(f"{top!r} must be a module that can be found, got none on the path of this process.")
        origin = Path(spec.origin).resolve()
        if not any(origin.is_relative_to(place) for place in _installed()):
            found[top] = origin.parent if spec.submodule_search_locations else origin
    return found


def _places() -> list[str]:
    main = getattr(sys.modules["__main__"], "__file__", None)
    return [*sys.path, *([str(Path(main).parent)] if main else [])]


def _installed() -> list[Path]:
    named = [sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib")]
    return [Path(place).resolve() for place in {*named, *site.getsitepackages()}]

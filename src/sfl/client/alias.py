"""Imports as a training script sees them: ``nvflare.client`` is ``sfl.client``, and torch is seeded as it loads.

A script written for FLARE's Client API runs unmodified, whether or not nvflare is installed. ``nvflare`` itself becomes
an empty package over the installed one's folders, so the rest of it can still be imported, and nothing of it need be.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from sfl.client.session import ScriptSite

_ALIASES = {
    "nvflare.client": "sfl.client",
    "nvflare.client.api": "sfl.client.api",
    "nvflare.client.hf": "sfl.client.huggingface",
    "nvflare.client.lightning": "sfl.client.lightning",
    "nvflare.client.tracking": "sfl.client.tracking",
}
_PACKAGE = "nvflare"


class ScriptImports(MetaPathFinder):
    """Stands first on ``sys.meta_path`` while a script runs.

    Args:
        site: Whose seed and device torch gets when the script is the first to load it.
        rank: The process's rank on this machine, if it is one of several: then it chooses its device itself.
    """

    def __init__(self, site: ScriptSite, rank: str | None = None) -> None:
        device = site.device if rank is None else "cpu"
        self._after: dict[str, Callable[[], None]] = {"torch": lambda: seed_torch(site.seed, device)}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Known names only; everything else is left to the finders that follow."""
        if fullname in _ALIASES:
            return ModuleSpec(fullname, _Alias(_ALIASES[fullname]))
        if fullname == _PACKAGE:
            spec = ModuleSpec(fullname, _Empty(), is_package=True)
            spec.submodule_search_locations = _installed(_PACKAGE)
            return spec
        if fullname.startswith("nvflare.client."):
            return PathFinder.find_spec(fullname, [f"{folder}/client" for folder in _installed(_PACKAGE)])
        return self._watched(fullname, path)

    def _watched(self, fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
        """The module's own spec, with a loader that calls back once it is loaded."""
        after = self._after.pop(fullname, None)
        spec = PathFinder.find_spec(fullname, path) if after is not None else None
        if spec is None or spec.loader is None or after is None:
            return None
        spec.loader = _Watched(spec.loader, after)
        return spec


class _Alias(Loader):
    """Puts the module of another name in the place of the one that is imported."""

    def __init__(self, home: str) -> None:
        self._home = home

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(self._home)


class _Empty(Loader):
    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = "0"  # type: ignore[attr-defined]


class _Watched(Loader):
    def __init__(self, loader: Loader, after: Callable[[], None]) -> None:
        self._loader, self._after = loader, after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._after()


def _installed(package: str) -> list[str]:
    """Folders of an installed package, without importing it."""
    return [str(folder) for entry in sys.path if (folder := Path(entry or ".") / package).is_dir()]


def seed_python(seed: int | None) -> None:
    """Seed the generator of ``random``; ``None`` leaves it."""
    if seed is not None:
        random.seed(seed)


def seed_numpy(seed: int | None) -> None:
    """Seed numpy's global generator, if numpy is loaded; ``None`` leaves it."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and seed is not None:
        numpy.random.seed(seed % 2**32)


def seed_torch(seed: int | None, device: str) -> None:
    """Seed torch's generators and choose its device, if torch is loaded."""
    if "torch" in sys.modules:
        from sfl.train.interop import seed_torch as seed_loaded

        seed_loaded(seed, device)

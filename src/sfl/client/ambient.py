"""What of a process belongs to the script that runs in it, and is swapped when another has its turn."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sfl.client.alias import ScriptImports, seed_numpy, seed_python, seed_torch
from sfl.client.session import ScriptSite
from sfl.train.interop import TorchState, set_torch_state, torch_state

Owns = Callable[[str, ModuleType], bool]


@dataclass(frozen=True, slots=True)
class _Globals:
    """The process's globals at one moment."""

    modules: dict[str, ModuleType]
    argv: list[str]
    path: list[str]
    cwd: str
    python: Any
    numpy: Any
    torch: TorchState

    @classmethod
    def now(cls, owns: Owns) -> _Globals:
        modules = {name: module for name, module in list(sys.modules.items()) if owns(name, module)}
        numpy_state = np.random.get_state()  # noqa: NPY002 - a script may draw from it, so it is kept
        state = random.getstate(), numpy_state, torch_state()
        return cls(modules, list(sys.argv), list(sys.path), str(Path.cwd()), *state)

    def restore(self, owns: Owns) -> None:
        for name in [name for name, module in list(sys.modules.items()) if owns(name, module)]:
            del sys.modules[name]
        sys.modules.update(self.modules)
        sys.argv[:], sys.path[:] = self.argv, self.path
        os.chdir(self.cwd)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 - see above
        set_torch_state(self.torch)


class Ambient:
    """A script's own view of the process.

    Its ``__main__``, ``sys.argv``, ``sys.path``, working folder, global random state, ``nvflare`` modules, and the
    modules that it imports from its own folder are its own. Environment variables, logging and what a script changes
    inside other modules are the process's.

    Args:
        path: The script's file.
        args: Its arguments.
        site: Whose seed and device it starts with.
    """

    def __init__(self, path: Path, args: tuple[str, ...], site: ScriptSite) -> None:
        self.main = _main_module(path)
        self._folder = str(path.parent)
        self._argv = [str(path), *args]
        self._site = site
        self._imports = ScriptImports(site)
        self._inside: _Globals | None = None

    @contextmanager
    def entered(self) -> Generator[None]:
        """The script's globals inside, those of the process again outside."""
        outside = _Globals.now(self._owns)
        try:
            if self._inside is None:
                self._begin()
            else:
                self._inside.restore(self._owns)
            sys.meta_path.insert(0, self._imports)
            yield
        finally:
            if self._imports in sys.meta_path:
                sys.meta_path.remove(self._imports)
            self._inside = _Globals.now(self._owns)
            outside.restore(self._owns)

    def _begin(self) -> None:
        for name in [name for name, module in list(sys.modules.items()) if self._owns(name, module)]:
            del sys.modules[name]
        sys.modules["__main__"] = self.main
        sys.argv[:] = self._argv
        sys.path.insert(0, self._folder)
        seed_python(self._site.seed)
        seed_numpy(self._site.seed)
        seed_torch(self._site.seed, self._site.device)

    def _owns(self, name: str, module: object) -> bool:
        top = name.partition(".")[0]
        if top in ("__main__", "nvflare"):
            return True
        return top != "sfl" and self._is_beside(module if top == name else sys.modules.get(top))

    def _is_beside(self, module: object) -> bool:
        """Whether a top-level module was found in the script's own folder."""
        file = getattr(module, "__dict__", {}).get("__file__")
        if not isinstance(file, str) or not file.startswith(self._folder):
            return False
        home = os.path.dirname(file)  # noqa: PTH120 - asked of every module at each switch
        if os.path.basename(file).startswith("__init__."):  # noqa: PTH119
            home = os.path.dirname(home)  # noqa: PTH120
        return home == self._folder


def _main_module(path: Path) -> ModuleType:
    main = ModuleType("__main__")
    main.__file__ = str(path)
    vars(main)["__builtins__"] = __builtins__
    return main

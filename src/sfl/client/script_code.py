"""A training script that travels with its job: which files it needs, and how it is found again on a site."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import cast

from sfl.client.script import ScriptClient
from sfl.client.site import SiteProgram
from sfl.errors import ConfigError

_FOLDER = "train-script"
"""Of a script and what lies beside it, in a job's code; no name of a module, so that nothing else imports from it."""


def script_files(path: Path) -> dict[str, Path]:
    """What has to travel: the script, and the modules and packages beside it that it imports, and they in turn.

    Only ``import`` statements are looked at; nothing is run. A package travels whole.

    Args:
        path: The script.

    Returns:
        Where each file or folder lies in the job's code, and where it lies here.

    Raises:
        ConfigError: If the script, or a module beside it, cannot be read or is no Python.
    """
    found, rest = {path.name: path}, [path]
    while rest:
        source = rest.pop()
        files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
        for name in sorted({name for file in files for name in _imported(file)}):
            place = _beside(name, path.parent)
            if place is not None and place.name not in found:
                found[place.name] = place
                rest.append(place)
    return {f"{_FOLDER}/{name}": place for name, place in sorted(found.items())}


def unplaced(program: SiteProgram) -> SiteProgram:
    """The program as it travels: a script is said by its name alone."""
    return _with_path(program, lambda path: path.name)


def placed(program: SiteProgram, code: Path) -> SiteProgram:
    """The program on a site whose job's code lies in ``code``."""
    return _with_path(program, lambda path: str(code / _FOLDER / path.name))


def _imported(file: Path) -> Iterator[str]:
    """The top-level names that a file imports, anywhere in it."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"a training script and what it imports must be Python, got {file}: {error}.") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _beside(name: str, folder: Path) -> Path | None:
    """The file or folder of a module, if it is found in ``folder``: Python looks there first."""
    if name in sys.builtin_module_names or name == "sfl":
        return None
    spec = PathFinder.find_spec(name, [str(folder), *sys.path])
    if spec is None:
        return None
    places = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.origin else [])]
    return next((Path(place) for place in places if Path(place).parent == folder), None)


def _with_path(program: SiteProgram, moved: Callable[[Path], str]) -> SiteProgram:
    script: object = program.kwargs.get("script")
    if program.client is not ScriptClient or not isinstance(script, Mapping):
        return program
    fields = cast("Mapping[str, object]", script)
    path = moved(Path(str(fields["path"])))
    return replace(program, kwargs={**program.kwargs, "script": {**fields, "path": path}})

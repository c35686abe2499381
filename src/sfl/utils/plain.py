"""Objects as plain values and importable names, and back: how a job reaches another process without pickle.

A recipe is frozen configuration: dataclasses, numbers, arrays, and classes or functions of importable modules. All of
it can be said as a tree that a person can read. Nothing is executed to read a tree back except importing the modules
that it names and calling the constructors of dataclasses; whoever reads one from a stranger says which names it allows.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import numpy as np

from sfl.errors import ConfigError

__all__ = ["Plain", "describe", "from_json", "names_in", "restore", "to_json"]

Plain: TypeAlias = Any
"""``None``, bool, int, float, str, ndarray, list, or a dict with one key that says its kind."""


def describe(value: object, what: str = "value") -> Plain:
    """``value`` as a plain tree.

    Args:
        value: Scalars, arrays, lists, tuples, dicts with string keys, paths, enums, dataclasses, stateless objects, and
            classes, functions, bound methods and partials whose names can be imported.
        what: How an error calls it.

    Raises:
        ConfigError: Naming the part that cannot be said, and what to do.

    Example:
        >>> describe({"scale": 2, "by": max})
        {'dict': {'scale': 2, 'by': {'name': 'builtins:max'}}}
    """
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    if isinstance(value, list):
        return [describe(item, f"{what}[{place}]") for place, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [describe(item, f"{what}[{place}]") for place, item in enumerate(value)]}
    if isinstance(value, Mapping):
        return {"dict": {_key(key, what): describe(item, f"{what}.{key}") for key, item in value.items()}}
    return _object(value, what)


def _object(value: object, what: str) -> Plain:
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, Enum):
        return {"enum": [_name(type(value), what), value.name]}
    if isinstance(value, functools.partial):
        parts = (value.func, list(value.args), dict(value.keywords))
        return {"partial": [describe(part, what) for part in parts]}
    if isinstance(value, MethodType) and not inspect.isclass(value.__self__):
        return {"method": [describe(value.__self__, what), value.__name__]}
    if inspect.isclass(value) or inspect.isroutine(value):
        return {"name": _name(value, what)}
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        described = {name: describe(item, f"{what}.{name}") for name, item in fields.items()}
        return {"object": [_name(type(value), what), described]}
    if not getattr(value, "__dict__", True) and _takes_nothing(type(value)):
        return {"object": [_name(type(value), what), {}]}
    raise ConfigError(
        f"{what} must be made of numbers, arrays, dataclasses and importable names to run in another process, "
        f"got {type(value).__name__}. Make it a frozen dataclass, or run in-process."
    )


def _takes_nothing(cls: type) -> bool:
    return cls.__init__ is object.__init__ and cls.__new__ is object.__new__


def _key(key: object, what: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"keys of {what} must be strings to run in another process, got {key!r}.")
    return key


def _name(value: Any, what: str) -> str:
    """``module:Qualified.name`` of a class or function, after checking that it leads back to it."""
    module, qualified = str(getattr(value, "__module__", None) or ""), str(getattr(value, "__qualname__", "?"))
    found: Any = sys.modules.get(module)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if found is not value and found != value:
        raise ConfigError(
            f"{what} must be a class or function of a module to run in another process, got {qualified!r} of "
            f"{module!r}. Define it at the top of a module or script, without lambda."
        )
    return f"{_importable(module, what)}:{qualified}"


def _importable(module: str, what: str) -> str:
    """Another process imports a script by its file's name: there, it is not ``__main__``."""
    if module != "__main__":
        return module
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None and not str(spec.name).endswith("__main__"):
        return str(spec.name)
    stem = Path(file).stem if file and Path(file).suffix == ".py" and Path(file).is_file() else ""
    if not stem.isidentifier():
        raise ConfigError(
            f"{what} must be importable to run in another process, got one that is defined in "
            f"{file or 'an interactive session'}. Put it into a module or a script whose name is an identifier."
        )
    return stem


def restore(tree: Plain, *, allow: Sequence[str] = ("",)) -> Any:
    """What ``describe`` was given.

    Args:
        tree: From ``describe``.
        allow: Prefixes of the names (``module:Qualified.name``) that may be imported; all by default.

    Raises:
        ConfigError: If the tree is none of ours, or names what is not here or not allowed.

    Example:
        >>> restore(describe((1, Path("a")))) == (1, Path("a"))
        True
    """
    if isinstance(tree, list):
        return [restore(item, allow=allow) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) != 1:
        raise ConfigError(f"a described value must be a dict with one key, got {sorted(tree)[:5]}.")
    ((kind, value),) = tree.items()
    reader = _READERS.get(kind)
    if reader is None:
        raise ConfigError(f"a described value must be of a known kind, got {kind!r}.")
    try:
        return reader(value, allow)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"a described {kind} must be whole, got {value!r:.80}: {error}.") from error


def _read_partial(value: Plain, allow: Sequence[str]) -> Any:
    function, args, kwargs = (restore(part, allow=allow) for part in value)
    return functools.partial(function, *args, **kwargs)


def _read_object(value: Plain, allow: Sequence[str]) -> Any:
    fields = {key: restore(item, allow=allow) for key, item in value[1].items()}
    return _constructor(value[0], allow)(**fields)


_READERS: Mapping[str, Callable[[Plain, Sequence[str]], Any]] = {
    "tuple": lambda value, allow: tuple(restore(item, allow=allow) for item in value),
    "dict": lambda value, allow: {key: restore(item, allow=allow) for key, item in value.items()},
    "path": lambda value, allow: Path(value),  # noqa: ARG005 - all readers are called alike
    "name": lambda value, allow: _found(value, allow),
    "enum": lambda value, allow: _found(value[0], allow)[value[1]],
    "partial": _read_partial,
    "method": lambda value, allow: getattr(restore(value[0], allow=allow), value[1]),
    "object": _read_object,
}


def _constructor(name: str, allow: Sequence[str]) -> Any:
    cls = _found(name, allow)
    if not (inspect.isclass(cls) and (dataclasses.is_dataclass(cls) or _takes_nothing(cls))):
        raise ConfigError(f"a described object must be of a dataclass or of a stateless class, got {name!r}.")
    return cls


def _found(name: str, allow: Sequence[str]) -> Any:
    module, _, qualified = name.partition(":")
    if not name.startswith(tuple(allow)):
        raise ConfigError(f"a described name must be one of {', '.join(allow)}, got {name!r}.")
    try:
        found: Any = import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{name!r} must be importable here, got {type(error).__name__}: {error}. "
            "Install the package that holds it on this machine."
        ) from error
    if not (inspect.isclass(found) or callable(found) or isinstance(found, FunctionType)):
        raise ConfigError(f"{name!r} must be a class or a function, got {type(found).__name__}.")
    return found


def names_in(tree: Plain) -> Iterator[str]:
    """The modules that a described value names."""
    if isinstance(tree, list):
        for item in tree:
            yield from names_in(item)
    elif isinstance(tree, dict):
        for kind, value in tree.items():
            if kind == "name":
                yield str(value).partition(":")[0]
            elif kind in ("enum", "object"):
                yield str(value[0]).partition(":")[0]
                yield from names_in({"dict": value[1]} if kind == "object" else None)
            elif kind == "dict":
                yield from names_in(list(value.values()))
            else:
                yield from names_in(value)


def to_json(tree: Plain) -> Plain:
    """The tree with its arrays as text, so that it is JSON."""
    if isinstance(tree, np.ndarray):
        native = np.ascontiguousarray(tree, dtype=tree.dtype.newbyteorder("<"))
        return {
            "array": [tree.dtype.newbyteorder("<").str, list(tree.shape), base64.b64encode(native.tobytes()).decode()]
        }
    if isinstance(tree, list):
        return [to_json(item) for item in tree]
    if isinstance(tree, dict):
        return {key: to_json(item) for key, item in tree.items()}
    return tree


def from_json(tree: Plain) -> Plain:
    """What ``to_json`` was given."""
    if isinstance(tree, list):
        return [from_json(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if set(tree) == {"array"} and isinstance(tree["array"], list):
        dtype, shape, text = tree["array"]
        array = np.frombuffer(base64.b64decode(text), dtype=np.dtype(dtype)).reshape(shape)
        return array.astype(array.dtype.newbyteorder("="))
    return {key: from_json(item) for key, item in tree.items()}

"""The options that a run config declares, and how a raw value becomes one of theirs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from sfl.errors import ConfigError

ENV_PREFIX: Final = "SFL_"

EXCLUSIVE: Final[tuple[tuple[str, ...], ...]] = (("local_epochs", "local_steps"),)
"""Options of which one at most is set. A layer that gives one unsets what lower layers say of the others."""

_TRUE: Final = frozenset({"true", "yes", "on", "1"})
_FALSE: Final = frozenset({"false", "no", "off", "0"})
_NOTHING: Final = frozenset({"", "none", "null"})
_RULES: Final[dict[object, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "none",
}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a run, as its dataclass field declares it.

    Attributes:
        name: Name of the field; unique among all sections.
        section: Field of the run config that holds it; empty for an option at the top level.
        annotation: Resolved type: bool, int, float, str, Path, Literal, or a union of those with None.
        default: Value when no layer gives one; ``dataclasses.MISSING`` when some layer must.
        help: Its line under "Attributes:" in the docstring.
    """

    name: str
    section: str
    annotation: Any
    default: object
    help: str

    @property
    def path(self) -> str:
        """Dotted name: ``federation.num_rounds``."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def flag(self) -> str:
        """Name on the command line: ``--num-rounds``."""
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        """Name in the environment: ``SFL_NUM_ROUNDS``."""
        return ENV_PREFIX + self.name.upper()

    @property
    def optional(self) -> bool:
        """Whether the value may be None."""
        return NoneType in _members(self.annotation)

    def read(self, value: object, source: str) -> object:
        """The value as the declared type.

        Raises:
            ConfigError: If it is not one, with the option, the rule, the value and the source.
        """
        for member in _members(self.annotation):
            try:
                return _as_type(value, member)
            except ValueError:
                continue
        rule = " or ".join(_rule(member) for member in _members(self.annotation))
        remedy = " Put it in quotes." if str in _members(self.annotation) else ""
        raise ConfigError(f"{self.name} must be {rule}, got {value!r} ({source}).{remedy}")

    def read_text(self, value: object, source: str) -> object:
        """As ``read``, where an optional value may also be spelled none, null or nothing at all."""
        if self.optional and isinstance(value, str) and value.strip().lower() in _NOTHING:
            return None
        return self.read(value, source)


def options_of(cls: type) -> dict[str, Option]:
    """The options of a run config, by name and in order of declaration.

    Args:
        cls: A dataclass whose fields are section dataclasses or plain options.

    Raises:
        ConfigError: If two sections declare the same name, or a field has a type that no option can have.
    """
    found: dict[str, Option] = {}
    for item in _init_fields(cls):
        hint = _hints(cls)[item.name]
        for option in (
            _section_options(item, hint)
            if isinstance(hint, type) and is_dataclass(hint)
            else [_option(cls, item, "", _default(item))]
        ):
            if option.name in found:
                raise ConfigError(
                    f"Option names of {cls.__name__} must be unique across sections, got {option.name!r} in "
                    f"{found[option.name].path} and {option.path}. Rename one of the fields."
                )
            found[option.name] = option
    return found


def _section_options(section: Field[Any], hint: type) -> list[Option]:
    defaults = _default(section)
    return [
        _option(hint, item, section.name, getattr(defaults, item.name) if defaults is not MISSING else _default(item))
        for item in _init_fields(hint)
    ]


def _option(cls: type, item: Field[Any], section: str, default: object) -> Option:
    annotation = _hints(cls)[item.name]
    for member in _members(annotation):
        if member not in _RULES and get_origin(member) is not Literal:
            raise ConfigError(
                f"{cls.__name__}.{item.name} must be declared as bool, int, float, str, Path, Literal or one of them "
                f"with None, got {annotation!r}. Change the type, or exclude the field with init=False."
            )
    name = item.name
    return Option(name=name, section=section, annotation=annotation, default=default, help=_help(cls).get(name, ""))


def _init_fields(cls: type) -> list[Field[Any]]:
    if not is_dataclass(cls):
        raise ConfigError(f"A run config must be a dataclass, got {cls!r}. Decorate it with @dataclass.")
    return [item for item in fields(cls) if item.init]


def _default(item: Field[Any]) -> object:
    return item.default_factory() if item.default_factory is not MISSING else item.default


@lru_cache(maxsize=64)  # asked for every field of a class
def _hints(cls: type) -> Mapping[str, Any]:
    return get_type_hints(cls)


@lru_cache(maxsize=64)
def _help(cls: type) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, attributes = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        for name, text in re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", attributes, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _rule(member: Any) -> str:
    if get_origin(member) is Literal:
        return " or ".join(str(choice) for choice in get_args(member))
    return _RULES[member]


def _as_type(value: object, member: Any) -> object:
    if get_origin(member) is Literal:
        return _as_choice(value, get_args(member))
    if member is bool and isinstance(value, str):
        return _as_bool(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if member is float and (is_number or isinstance(value, str)):
        return float(value)  # pyright: ignore[reportArgumentType]
    if (member is int and isinstance(value, str)) or (member is Path and isinstance(value, str)):
        return member(value)
    if type(value) is member or (member is Path and isinstance(value, Path)):
        return value
    raise ValueError


def _as_choice(value: object, choices: tuple[object, ...]) -> object:
    for choice in choices:
        if str(value) == str(choice):
            return choice
    raise ValueError


def _as_bool(value: str) -> bool:
    if value.strip().lower() in _TRUE | _FALSE:
        return value.strip().lower() in _TRUE
    raise ValueError

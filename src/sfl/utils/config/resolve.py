"""Layers to a run config, and a run config back to YAML."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from sfl.errors import ConfigError
from sfl.utils.config.layers import Given, Layer, default_layer, environment_layer, merge, override_layer, yaml_layer
from sfl.utils.config.options import options_of

T = TypeVar("T")


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """A run config and where each of its values comes from.

    Attributes:
        config: The run config.
        sources: Dotted option name to ``default``, ``file:line``, ``environment SFL_…`` or ``--flag``.
    """

    config: T
    sources: Mapping[str, str]

    def rows(self) -> Iterator[tuple[str, object, str]]:
        """Dotted name, value and source of every option, in order of declaration."""
        for path, source in self.sources.items():
            value: object = self.config
            for name in path.split("."):
                value = getattr(value, name)
            yield path, value, source


def resolve(
    cls: type[T],
    *,
    yaml_files: Iterable[str | Path] = (),
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
    allowed_environ: Collection[str] = (),
) -> Resolved[T]:
    """Build a run config from defaults < YAML files < environment < overrides.

    Args:
        cls: Dataclass of section dataclasses and plain options; option names are unique across sections.
        yaml_files: Files with a mapping per section; a later file wins.
        environ: Variables to read; ``os.environ`` by default, ``{}`` for none.
        overrides: Values by option name; strings are read as on the command line.
        allowed_environ: ``SFL_…`` variables that are no options and are left alone.

    Raises:
        ConfigError: If a name is unknown or a value is wrong, with its source and what to do.
    """
    options = options_of(cls)
    layers = [
        default_layer(options),
        *(yaml_layer(options, Path(file)) for file in yaml_files),
        environment_layer(options, os.environ if environ is None else environ, allowed_environ),
        override_layer(options, overrides or {}),
    ]
    given = merge(layers)
    for name, (value, _) in given.items():
        if value is MISSING:
            flag, variable = options[name].flag, options[name].env
            raise ConfigError(f"{name} must be given, got nothing. Set {flag}, {variable} or {options[name].path}.")
    return Resolved(_build(cls, given), {option.path: given[name].source for name, option in options.items()})


def load_config(cls: type[T], path: str | Path) -> T:
    """The run config of one YAML file over the defaults; the environment is not read.

    Raises:
        ConfigError: If the file cannot be read or does not fit ``cls``.
    """
    return resolve(cls, yaml_files=[path], environ={}).config


def to_dict(config: object) -> dict[str, Any]:
    """The config as nested plain values, sections in order of declaration."""
    return {item.name: _plain(getattr(config, item.name)) for item in fields(config) if item.init}  # pyright: ignore


_UNICODE_BREAKS = ("\x85", "\u2028", "\u2029")
"""PyYAML writes these as they are and reads them back as the end of a line."""


def dump_yaml(config: object, sources: Mapping[str, str] | None = None) -> str:
    """The config as YAML that ``load_config`` reads back to an equal value.

    Args:
        config: A run config.
        sources: Where each value came from, by dotted name; written behind it as a comment.
    """
    import yaml

    values = to_dict(config)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=float("inf"))
    if any(mark in text for mark in _UNICODE_BREAKS):
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=float("inf"))
    section, lines = "", list[str]()
    for line in text.split("\n")[:-1]:
        name = line.strip().partition(":")[0]
        section = section if line.startswith(" ") else name
        source = (sources or {}).get(f"{section}.{name}" if line.startswith(" ") else name)
        lines.append(f"{line}  # {source}" if source else line)
    return "\n".join(lines) + "\n"


def _plain(value: object) -> object:
    if is_dataclass(value):
        return to_dict(value)
    return str(value) if isinstance(value, Path) else value


def _build(cls: type[T], given: Layer) -> T:
    """An instance of ``cls``, its sections built first; what they refuse is reported with its source."""
    hints = get_type_hints(cls)
    values: dict[str, object] = {}
    for item in fields(cls):  # pyright: ignore[reportArgumentType]
        if item.init:
            values[item.name] = (
                _build(hints[item.name], given) if is_dataclass(hints[item.name]) else given[item.name][0]
            )
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{error}{_blame(str(error), given)}") from error


def _blame(message: str, given: Mapping[str, Given]) -> str:
    words = set(re.findall(r"\w+", message))
    named = [f"{name}: {source}" for name, (_, source) in given.items() if name in words and source != "default"]
    return f" ({', '.join(named)})" if named else ""

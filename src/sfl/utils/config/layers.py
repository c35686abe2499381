"""The layers above the defaults: YAML files, the environment, and overrides from the command line.

A layer maps option names to a value of the declared type and where it was given.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from sfl.errors import ConfigError, nearest
from sfl.utils.config.options import ENV_PREFIX, EXCLUSIVE, Option

if TYPE_CHECKING:
    import yaml


class Given(NamedTuple):
    """A value and where it comes from."""

    value: object
    source: str


Layer: TypeAlias = dict[str, Given]
Options: TypeAlias = Mapping[str, Option]


def default_layer(options: Options) -> Layer:
    """What the dataclasses say."""
    return {name: Given(option.default, "default") for name, option in options.items()}


def environment_layer(options: Options, environ: Mapping[str, str], allowed: Collection[str] = ()) -> Layer:
    """What the ``SFL_…`` variables say.

    Raises:
        ConfigError: If such a variable is neither an option nor in ``allowed``, or its value has the wrong type.
    """
    by_variable = {option.env: option for option in options.values()}
    layer: Layer = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in allowed:
            continue
        if variable not in by_variable:
            raise ConfigError(
                f"A variable that starts with {ENV_PREFIX} must name an option, got {variable!r}. "
                f"{nearest(variable, by_variable)} Unset it if it is not meant for this run."
            )
        option, source = by_variable[variable], f"environment {variable}"
        layer[option.name] = Given(option.read_text(text, source), source)
    return layer


def override_layer(options: Options, overrides: Mapping[str, object]) -> Layer:
    """What the command line or a caller says, by option name.

    Raises:
        ConfigError: If a name is not an option, or a value has the wrong type.
    """
    layer: Layer = {}
    for name, value in overrides.items():
        if name not in options:
            raise ConfigError(f"An override must name an option, got {name!r}. {nearest(name, options)}")
        flag = options[name].flag
        layer[name] = Given(options[name].read_text(value, flag), flag)
    return layer


def yaml_layer(options: Options, path: Path) -> Layer:
    """What a YAML file says; each source is ``file:line``.

    Raises:
        ConfigError: If the file is missing or is no mapping of sections, or a section, key or value is wrong.
    """
    layer: Layer = {}
    sections = {option.section for option in options.values() if option.section}
    top_level = {option.name for option in options.values() if not option.section}
    loader, root = _parse(path)
    for name, node, where in _entries(root, loader, str(path)):
        if name in sections:
            for key, value, at in _entries(node, loader, where, section=name):
                _add(layer, options, (name, key), Given(_construct(loader, value, at), at))
        elif name in top_level:
            _add(layer, options, ("", name), Given(_construct(loader, node, where), where))
        else:
            remedy = (
                f"Move it under {options[name].section}:." if name in options else nearest(name, sections | top_level)
            )
            raise ConfigError(f"A top-level key of a config must be a section, got {name!r} ({where}). {remedy}")
    return layer


def merge(layers: list[Layer]) -> Layer:
    """One layer from many, where later ones win and exclusive options give way to each other.

    Raises:
        ConfigError: If one layer gives two options of which one at most may be set.
    """
    merged: Layer = {}
    for layer in layers:
        for names in EXCLUSIVE:
            _give_way(names, layer, merged)
        merged |= layer
    return merged


def _give_way(names: tuple[str, ...], layer: Layer, merged: Layer) -> None:
    given = [name for name in names if name in layer and layer[name].value is not None]
    if len(given) > 1:
        seen = " and ".join(f"{name}={layer[name].value!r} ({layer[name].source})" for name in given)
        raise ConfigError(f"{' and '.join(names)} must not be set together, got {seen}. Remove one of them.")
    if given:
        gone = Given(None, f"unset by {layer[given[0]].source}")
        merged |= {name: gone for name in names if name in merged and merged[name].value is not None}


def _add(layer: Layer, options: Options, path: tuple[str, str], given: Given) -> None:
    section, name = path
    option = options.get(name)
    if option is None or option.section != section:
        known = [option.name for option in options.values() if option.section == section]
        remedy = f"Move it to {option.path}." if option else nearest(name, known)
        raise ConfigError(f"A key under {section}: must be one of its options, got {name!r} ({given.source}). {remedy}")
    layer[name] = Given(option.read(given.value, given.source), given.source)


def _parse(path: Path) -> tuple[yaml.SafeLoader, yaml.Node | None]:
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        return loader, loader.get_single_node()
    except OSError as error:
        raise ConfigError(f"A config must be a readable YAML file, got {str(path)!r} ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"A config must be text in UTF-8, got {str(path)!r} ({error.reason}).") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark: Any = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"A config must be valid YAML, got {problem} ({where}). Mend the syntax there.") from error


def _entries(
    node: yaml.Node | None, loader: yaml.SafeLoader, where: str, section: str = ""
) -> Iterator[tuple[str, yaml.Node, str]]:
    """Key, value and ``file:line`` of each entry of a mapping; none for an empty one."""
    import yaml

    what = f"Section {section!r}" if section else "A config"
    if node is None or (isinstance(node, yaml.ScalarNode) and _construct(loader, node, where) is None):
        return
    if not isinstance(node, yaml.MappingNode) or node.tag != loader.DEFAULT_MAPPING_TAG:
        seen_kind = "a list" if isinstance(node, yaml.SequenceNode) else repr(_construct(loader, node, where))
        raise ConfigError(f"{what} must be a mapping, got {seen_kind} ({where}). Write one 'name: value' a line.")
    seen: set[Hashable] = set()
    for key_node, value_node in node.value:
        at = f"{where.rsplit(':', 1)[0] if section else where}:{key_node.start_mark.line + 1}"
        key = _construct(loader, key_node, at)
        if not isinstance(key, str):
            raise ConfigError(f"A key must be a name, got {key!r} ({at}). {what} takes names of options.")
        if key in seen:
            raise ConfigError(f"A key must be given once, got {key!r} again ({at}). Remove one of the two.")
        seen.add(key)
        yield key, value_node, at


def _construct(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> Any:
    import yaml

    try:
        return loader.construct_object(node, deep=True)  # pyright: ignore[reportUnknownMemberType]
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"A value must be plain YAML, got {problem} ({where}). Write a number or text.") from error

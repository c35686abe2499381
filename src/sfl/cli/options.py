"""The fields of a run config as flags of a command, so that an option is declared once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

from cyclopts import Group, Parameter

from sfl.utils.config import Option, options_of

if TYPE_CHECKING:
    from cyclopts import Token

R = TypeVar("R")

SHORT: Final[Mapping[str, str]] = {"verbose": "-v"}
"""One-letter names of options."""


def with_options(configs: Sequence[type], body: Callable[..., R]) -> Callable[..., R]:
    """A command with the parameters of ``body``, whose ``**overrides`` become one flag per option of ``configs``.

    What several of them have is one flag, shown as the first has it.

    The body receives only the flags that were given, as they were typed: ``sfl.utils.config.resolve`` reads them with
    the same rules as the environment, and its messages name the flag.
    """

    @wraps(body)
    def command(*args: object, **kwargs: object) -> R:
        return body(*args, **kwargs)

    signature = inspect.signature(body)
    own = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    named: dict[str, Option] = {}
    for config in configs:
        named.update({name: option for name, option in options_of(config).items() if name not in named})
    options = named.values()
    sections = list(dict.fromkeys(option.section for option in options))
    groups = {name: Group((name or "options").capitalize(), sort_key=place) for place, name in enumerate(sections)}
    flags = [_flag(option, groups[option.section]) for option in options]
    command.__signature__ = signature.replace(parameters=[*own, *flags])  # pyright: ignore[reportAttributeAccessIssue]
    return command


class _ReadLater:
    """Tells pydantic, which cyclopts validates with where something has loaded it, to let a flag pass as typed."""

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> object:
        from pydantic_core import core_schema

        return core_schema.any_schema()


def _flag(option: Option, group: Group) -> inspect.Parameter:
    names = [option.flag, SHORT[option.name]] if option.name in SHORT else [option.flag]
    parameter = Parameter(name=names, help=option.help, group=group, converter=_as_typed)
    annotation = Annotated[option.annotation, parameter, _ReadLater()]
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(option.name, kind, default=_shown(option.default), annotation=annotation)


def _shown(default: object) -> object:
    return default if isinstance(default, bool | int | float) or default else None


def _as_typed(_: Any, tokens: Sequence[Token]) -> object:
    last = tokens[-1]
    return last.implicit_value if isinstance(last.implicit_value, bool) else last.value

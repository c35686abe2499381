"""Layers that do not leave a site."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, TypeAlias

from sfl.core.task import Update
from sfl.core.transform import Stateless
from sfl.errors import ConfigError
from sfl.types import Parameters

__all__ = ["ExcludeLayers", "FreezeLayers", "Layer", "chosen_layers", "parse_layers"]

Layer: TypeAlias = int | str
"""Which arrays are meant: the position of one in the model's order, a name, a prefix of names, or a pattern."""


def parse_layers(text: str) -> tuple[Layer, ...]:
    """The layers that a comma-separated option names.

    Example:
        >>> parse_layers("0, 1, esm.embeddings, *.bias")
        (0, 1, 'esm.embeddings', '*.bias')
    """
    parts = [part.strip() for part in text.split(",")]
    return tuple(int(part) if part.lstrip("-").isdigit() else part for part in parts if part)


def chosen_layers(layers: Sequence[Layer], names: Sequence[str]) -> list[str]:
    """The names of arrays that ``layers`` mean, in the model's order.

    Args:
        layers: A whole number is a position (negative ones count from the end); text is a name, the beginning of
            dotted names (``"esm.encoder"``), or a pattern with ``*`` and ``?``.
        names: The model's.

    Raises:
        ConfigError: If one of them means nothing in this model.

    Example:
        >>> chosen_layers([0, "head", "*.bias"], ["body.weight", "body.bias", "head.weight", "neck"])
        ['body.weight', 'body.bias', 'head.weight']
    """
    found: set[str] = set()
    for layer in layers:
        matched = _matched(layer, names)
        if not matched:
            raise ConfigError(f"a layer must be one of the model's, got {layer!r}. {_remedy(layer, names)}")
        found.update(matched)
    return [name for name in names if name in found]


def _matched(layer: Layer, names: Sequence[str]) -> list[str]:
    if isinstance(layer, int):
        return [names[layer]] if -len(names) <= layer < len(names) else []
    return [name for name in names if name == layer or name.startswith(f"{layer}.") or fnmatchcase(name, layer)]


def _remedy(layer: Layer, names: Sequence[str]) -> str:
    if isinstance(layer, int):
        return f"It has {len(names)} arrays: give a position from 0 to {len(names) - 1}."
    prefixes = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
    near = difflib.get_close_matches(layer, sorted(prefixes), n=1, cutoff=0.0)
    return f"Did you mean {near[0]!r}?" if near else "It has no arrays."


@dataclass(frozen=True, slots=True)
class ExcludeLayers(Stateless):
    """Leaves out arrays: what a site learned of them stays there, and the global model keeps what it has.

    Attributes:
        layers: See ``chosen_layers``.

    | input | result |
    |---|---|
    | a layer that the model lacks | an error that names the nearest one, before the first round |
    | every layer | an error: nothing would leave |
    | zero, NaN, inf in what stays in | as they are |

    Formal guarantees: none. Later rounds tell what was left out: other layers are trained with it.
    """

    raises_norm: ClassVar[bool] = False

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ConfigError(f"{type(self).__name__} must be told at least one layer, got none. Leave it out.")

    def sends(self, parameters: Parameters) -> Parameters:
        """All but these."""
        left = set(chosen_layers(self.layers, list(parameters)))
        if len(left) == len(parameters):
            raise ConfigError(f"some layer must leave a site, got {self.layers}, which means all. Name fewer.")
        return {name: value for name, value in parameters.items() if name not in left}

    def change(self, update: Update) -> Update:
        """All but these."""
        return replace(update, delta=self.sends(update.delta))

    def caveat(self) -> str:
        """That staying at home hides nothing by itself."""
        shown = ", ".join(map(str, self.layers))
        return f"excluded layers ({shown}): their updates do not leave a site; that adds no formal guarantee"


class FreezeLayers(ExcludeLayers):
    """Leaves out arrays that sites do not train: every site works with the global model's, and their shape stays.

    Clients that know of it spare their gradients (those of the applications do); for any other client the arrays are
    left out all the same. This is not the Partial Vector Freezing of arXiv 2312.04920, which is a linear transform.
    """

    def caveat(self) -> str:
        """What it is for."""
        shown = ", ".join(map(str, self.layers))
        return f"frozen layers ({shown}): not trained and not sent; that adds no formal guarantee"

"""Events and figures as JSON that every parser reads."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["dump_line", "to_float", "to_jsonable"]


def to_jsonable(value: object) -> Any:
    """Dataclasses, mappings, sequences, numpy scalars and figures as plain JSON values.

    JSON has no word for what is not finite: NaN and the infinities become the strings ``"NaN"``, ``"Infinity"`` and
    ``"-Infinity"``, which ``to_float`` (and JavaScript's ``Number``) turns back.

    >>> to_jsonable({"loss": float("nan"), "n": (1, 2)})
    {'loss': 'NaN', 'n': [1, 2]}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else _word(value)
    if dataclasses.is_dataclass(value):
        return {field.name: to_jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    return value if value is None or isinstance(value, bool | int) else str(value)


def _word(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def to_float(value: object) -> float:
    """A figure as ``to_jsonable`` wrote it; NaN for what is no figure.

    >>> to_float("-Infinity")
    -inf
    """
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return math.nan


def dump_line(value: object) -> str:
    """The value as one line of JSON in ASCII, without its newline."""
    return json.dumps(to_jsonable(value), allow_nan=False)

"""Texts and arrays of the wire format as a FLARE shareable."""

from __future__ import annotations

from typing import Any

import numpy as np
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable

from sfl.core.task import EVALUATE, FIT
from sfl.types import Parameters

_TEXT, _ARRAYS = "sfl", "sfl.arrays"
TASKS = {FIT: "train", EVALUATE: "validate"}
OTHER = "sfl"
"""FLARE's name of a task that is a step of a protocol."""


def pack(text: str, arrays: Parameters) -> Shareable:
    """A shareable that holds the text and the arrays."""
    shareable = Shareable()
    shareable[_TEXT] = text
    shareable[_ARRAYS] = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in arrays.items()}
    return shareable


def unpack(shareable: Shareable) -> tuple[str, Parameters]:
    """The text and the arrays.

    Raises:
        ValueError: If it is none of ours, or says that a site's process failed before our code ran.
    """
    code = shareable.get_return_code()
    if code != ReturnCode.OK:
        raise ValueError(f"FLARE's {code}; the site's own log says why")
    text, arrays = shareable.get(_TEXT), shareable.get(_ARRAYS)
    if not isinstance(text, str) or not isinstance(arrays, dict):
        raise ValueError(f"a shareable must hold {_TEXT!r} and {_ARRAYS!r}, got {sorted(map(str, shareable))}.")
    return text, {str(name): _plain(name, value) for name, value in arrays.items()}


def _plain(name: Any, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype.hasobject:
        raise ValueError(f"{name!r} must be an array of numbers, got {type(value).__name__}.")
    return value

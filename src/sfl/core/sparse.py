"""Arrays that are mostly zero, as what travels: the values that are not, and where they stand. No bit is lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sfl.errors import UpdateError
from sfl.types import Array, Parameters

__all__ = ["WHERE", "is_packed", "nbytes", "packed", "unpacked"]

WHERE = "\x1fwhere"
"""What is added to an array's name for the positions of its values: a character that no layer's name has."""


def is_packed(arrays: object) -> bool:
    """Whether there are positions among them, whatever arrived."""
    return isinstance(arrays, dict) and any(str(name).endswith(WHERE) for name in arrays)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def packed(parameters: Mapping[str, Array], *, width: float | None = None) -> Parameters:
    """The same arrays; one that is smaller without its zeros becomes its values and their positions.

    Positions are four bytes each, or one bit for each element of the whole, whichever is less. A negative zero is no
    zero. Names and their order stay, so that the arrays of a reply are known by the model's names.

    Args:
        parameters: Named arrays.
        width: Bytes in which a value will travel; by default its own.
    """
    out: Parameters = {}
    for name, value in parameters.items():
        marked = _bits(value)
        count = int(np.count_nonzero(marked))
        each = value.itemsize if width is None else width
        if _size(value, count, each) >= each * value.size:
            out[name] = value
            continue
        out[name] = value.reshape(-1)[marked]
        where = np.flatnonzero(marked).astype(np.uint32) if _lists(value, count) else np.packbits(marked)
        out[name + WHERE] = where
    return out


def unpacked(arrays: Mapping[str, Array], like: Mapping[str, Array]) -> Parameters:
    """What was packed, with the shapes of ``like``: what arrives says nothing of how much memory it takes.

    Raises:
        UpdateError: If values and positions do not fit each other, or the array that is expected.
    """
    out: Parameters = {}
    for name, value in arrays.items():
        if name.endswith(WHERE):
            continue
        where = arrays.get(name + WHERE)
        out[name] = value if where is None else _whole(name, value, where, like.get(name))
    if extra := sorted(name for name in arrays if name.endswith(WHERE) and name.removesuffix(WHERE) not in out):
        raise UpdateError(f"positions must come with values, got none for {extra[0]!r}.")
    return out


def nbytes(parameters: Mapping[str, Array]) -> int:
    """Bytes of what ``packed`` gives."""
    counts = {name: int(np.count_nonzero(_bits(value))) for name, value in parameters.items()}
    return sum(min(int(_size(v, counts[name], v.itemsize)), v.nbytes) for name, v in parameters.items())


def _bits(value: Array) -> Array:
    """Whether each element is anything but a positive zero, as one row."""
    flat = np.ascontiguousarray(value).reshape(-1)
    return np.asarray(flat.view(np.dtype(f"u{flat.dtype.itemsize}")) != 0)


def _size(value: Array, count: int, width: float) -> float:
    return count * width + min(4 * count, -(-value.size // 8)) if value.size < 2**32 else value.size * width


def _lists(value: Array, count: int) -> bool:
    return 4 * count <= -(-value.size // 8)


def _whole(name: str, values: Array, where: Array, like: Array | None) -> Array:
    if like is None or values.ndim != 1 or where.ndim != 1 or values.dtype.kind not in "fiub":
        raise UpdateError(f"{name!r} must be an array of the model, as values and positions in rows.")
    positions = _positions(name, where, like.size)
    if positions.size != values.size:
        raise UpdateError(f"{name!r} must have a position for each value, got {positions.size} for {values.size}.")
    whole: np.ndarray[Any, Any] = np.zeros(like.size, values.dtype)
    whole[positions] = values
    return whole.reshape(like.shape)


def _positions(name: str, where: Array, size: int) -> Array:
    if where.dtype == np.uint8 and where.size == -(-size // 8):
        return np.flatnonzero(np.unpackbits(where, count=size))
    if where.dtype == np.uint32 and (where.size == 0 or (where[-1] < size and bool(np.all(where[1:] > where[:-1])))):
        return where
    raise UpdateError(f"the positions of {name!r} must be ascending and below {size}, or a bit for each element.")

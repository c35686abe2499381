"""Named functions on ``Parameters``. No class hierarchy: a model is a dict of arrays.

Large models are walked in blocks that stay in the processor's cache, so that a subtraction with its check, or a
scaled addition, is one pass over memory and needs no temporary of the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from sfl.types import BUFFERS, Array, Parameters

BLOCK = 1 << 16  # elements; a float32 block and its partner fit a 1-MB second-level cache
_ALIGN = 64  # bytes: a cache line


def empty(specs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> Parameters:
    """Uninitialised arrays of these shapes and dtypes, one after the other in one piece of memory.

    A large piece is backed by huge pages and given back as a whole: page by page, the kernel takes four times as long
    to provide a model's memory as it takes to fill it.
    """
    starts = [0]
    for shape, dtype in specs.values():
        starts.append(-(-(starts[-1] + math.prod(shape) * dtype.itemsize) // _ALIGN) * _ALIGN)
    memory = np.empty(starts[-1], dtype=np.uint8)
    return {
        name: np.ndarray(shape, dtype, buffer=memory, offset=start)
        for (name, (shape, dtype)), start in zip(specs.items(), starts, strict=False)
    }


def zeros_like(parameters: Mapping[str, Array]) -> Parameters:
    """Zeros of the same names, shapes and dtypes."""
    return {name: np.zeros_like(value) for name, value in parameters.items()}


def copy(parameters: Mapping[str, Array]) -> Parameters:
    """A deep, writable copy."""
    return {name: np.array(value) for name, value in parameters.items()}


def add(left: Mapping[str, Array], right: Mapping[str, Array]) -> Parameters:
    """``left + right``, name by name (names of ``left``)."""
    return {name: np.asarray(value + right[name]) for name, value in left.items()}


def subtract(left: Mapping[str, Array], right: Mapping[str, Array]) -> Parameters:
    """``left - right``, name by name (names of ``left``)."""
    return {name: np.asarray(value - right[name]) for name, value in left.items()}


def scale(parameters: Mapping[str, Array], factor: float) -> Parameters:
    """``factor * parameters``; each array keeps its dtype (integers are truncated towards zero)."""
    return {name: np.asarray(value * factor).astype(value.dtype, copy=False) for name, value in parameters.items()}


def is_trained(name: str, value: Array) -> bool:
    """Whether a gradient moves an array: it is floating, and no statistic of BatchNorm.

    >>> is_trained("norm.running_var", np.ones(2)), is_trained("norm.weight", np.ones(2))
    (False, True)
    """
    return value.dtype.kind == "f" and not any(fnmatchcase(name, pattern) for pattern in BUFFERS)


def num_parameters(parameters: Mapping[str, Array]) -> int:
    """Number of scalars."""
    return sum(value.size for value in parameters.values())


def nbytes(parameters: Mapping[str, Array]) -> int:
    """Size in bytes."""
    return sum(value.nbytes for value in parameters.values())


def l2_norm(parameters: Mapping[str, Array]) -> float:
    """Euclidean norm over all arrays together, accumulated in float64. NaN and inf pass through.

    >>> l2_norm({"a": np.array([3.0]), "b": np.array([4.0])})
    5.0
    """
    total = 0.0
    with np.errstate(over="ignore"):  # squares of 1e154 and more: the norm is inf, as numpy's own
        for value in parameters.values():
            for block in blocks(value):
                wide = block.astype(np.float64)
                total += float(np.dot(wide, wide))
    return math.sqrt(total)


def blocks(value: Array) -> Iterator[Array]:
    """The array as flat pieces of ``BLOCK`` elements; views where the memory is contiguous."""
    flat = value.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        yield flat[start : start + BLOCK]


def is_finite(value: Array) -> bool:
    """Whether no element of a real array is NaN or inf, in one pass and without a temporary of the array's size."""
    if value.dtype.kind != "f":
        return True
    if value.size <= BLOCK:
        return _all_finite(value)
    with np.errstate(over="ignore", invalid="ignore"):
        return all(map(_is_finite, blocks(value)))


def _is_finite(block: Array) -> bool:
    # A finite dot product proves finite elements, in a quarter of the time; a huge block overflows: look closely.
    return math.isfinite(float(np.dot(block, block))) or _all_finite(block)


def _all_finite(value: Array) -> bool:
    return np.count_nonzero(np.isfinite(value)) == value.size


def subtract_into(updated: Array, base: Array, out: Array) -> bool:
    """``out = updated - base`` in ``out``'s dtype, and whether all of it is finite, in one pass over memory.

    Args:
        updated: Any real array.
        base: Of the same shape.
        out: Of the same shape; it may be ``updated``.
    """
    if out.size <= BLOCK or not out.flags.c_contiguous:  # reshape(-1) would write to a copy of such an array
        return is_finite(np.subtract(updated, base, out=out, dtype=out.dtype))
    finite = True
    with np.errstate(over="ignore", invalid="ignore"):
        for left, right, difference in zip(blocks(updated), blocks(base), blocks(out), strict=True):
            np.subtract(left, right, out=difference, dtype=out.dtype)
            finite = finite and _is_finite(difference)
    return finite


def add_scaled(total: Array, value: Array, factor: float) -> None:
    """``total += factor * value`` in place and in ``total``'s dtype, block by block (one pass over memory)."""
    if value.size <= BLOCK or not total.flags.c_contiguous:  # reshape(-1) would write to a copy of such a total
        np.add(total, np.multiply(value, factor, dtype=total.dtype), out=total)
        return
    flat, source = total.reshape(-1), value.reshape(-1)
    scratch = np.empty(BLOCK, dtype=total.dtype)
    for start in range(0, source.size, BLOCK):
        piece = source[start : start + BLOCK]
        part = scratch[: piece.size]
        np.multiply(piece, factor, out=part, dtype=total.dtype)
        target = flat[start : start + BLOCK]
        np.add(target, part, out=target)


def read_only(parameters: Mapping[str, Array]) -> Parameters:
    """Views that refuse to be written to: what every client of a worker shares."""
    views: Parameters = {}
    for name, value in parameters.items():
        view = value.view()
        view.flags.writeable = False
        views[name] = view
    return views

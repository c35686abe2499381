"""An update's real numbers as one vector, and back: filters choose coordinates, not arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from sfl.core import check
from sfl.core.task import Update
from sfl.types import Array, Parameters

__all__ = ["flat", "kept_count", "largest", "refuse_not_finite", "unflat"]


def flat(delta: Mapping[str, Array]) -> Array:
    """All coordinates, in order, in float64."""
    parts = [np.asarray(value, dtype=np.float64).reshape(-1) for value in delta.values()]
    return np.concatenate(parts) if parts else np.zeros(0)


def unflat(vector: Array, like: Mapping[str, Array]) -> Parameters:
    """New arrays of the names, shapes and dtypes of ``like``; integers are rounded to the nearest."""
    out: Parameters = {}
    start = 0
    for name, value in like.items():
        part = vector[start : start + value.size].reshape(value.shape)
        start += value.size
        whole = part if value.dtype.kind == "f" else np.rint(part)
        out[name] = np.asarray(whole, dtype=value.dtype)
    return out


def kept_count(share: float, size: int) -> int:
    """How many of ``size`` coordinates a share is: at least one where there are any, never more than all."""
    return min(size, max(1, round(share * size))) if size else 0


def largest(scores: Array, count: int) -> Array:
    """Whether each coordinate is among the ``count`` of largest score; of equal ones the first are."""
    chosen = np.zeros(scores.size, dtype=bool)
    if count <= 0:
        return chosen
    least = np.partition(scores, scores.size - count)[scores.size - count]
    np.greater(scores, least, out=chosen)
    ties = np.flatnonzero(scores == least)
    chosen[ties[: count - int(np.count_nonzero(chosen))]] = True
    return chosen


def refuse_not_finite(update: Update) -> None:
    """No order holds among numbers that are none.

    Raises:
        UpdateError: Naming the site and the first array with NaN or inf.
    """
    check.check_finite(update.site, update.delta)


def is_share(value: float) -> bool:
    """Whether it is a share of something: in (0, 1]."""
    return math.isfinite(value) and 0.0 < value <= 1.0

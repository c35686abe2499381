"""What arrived, as the arrays that it stands for."""

from __future__ import annotations

from collections.abc import Mapping

from sfl.core import quantise, sparse
from sfl.types import Array, Parameters

__all__ = ["is_packed", "unpacked"]


def is_packed(arrays: object) -> bool:
    """Whether there are codes or positions among them, whatever arrived."""
    return quantise.is_packed(arrays) or sparse.is_packed(arrays)


def unpacked(arrays: Parameters, like: Mapping[str, Array]) -> Parameters:
    """With their zeros, in floats; as they are where they have come whole.

    Args:
        arrays: What arrived. Nothing of it is trusted.
        like: What is expected.

    Raises:
        UpdateError: If the parts of an array do not fit each other, or the array that is expected.
    """
    if quantise.is_packed(arrays):
        return quantise.unpacked(arrays, like)
    return sparse.unpacked(arrays, like) if sparse.is_packed(arrays) else arrays

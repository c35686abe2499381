"""Length-sorted batches: sequences of like length share a batch, so that little of it is padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def length_sorted_batches(
    lengths: NDArray[np.int64], batch_size: int, generator: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """One epoch of batches of indices: every example once, batches of like length, in random order.

    Args:
        lengths: Length of each example, shape ``(n,)``.
        batch_size: Examples in a batch; the last one may hold fewer.
        generator: Draws which of equal length go together, and the order of the batches.

    Yields:
        Indices, shape ``(batch_size,)``.

    Example:
        >>> lengths = np.array([9, 1, 8, 2])
        >>> sorted(sorted(b.tolist()) for b in length_sorted_batches(lengths, 2, np.random.default_rng(0)))
        [[0, 2], [1, 3]]
    """
    shuffled = generator.permutation(len(lengths))
    order = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    starts = np.arange(0, len(order), batch_size)
    for start in generator.permutation(starts):
        yield order[start : start + batch_size]

"""What a site trains and evaluates on, as batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Batch", "Examples", "repeated"]

Batch = TypeVar("Batch", bound=Sized)


class Examples(ABC, Generic[Batch]):
    """The examples of a site, ready to be shown to a model."""

    @property
    @abstractmethod
    def lengths(self) -> NDArray[np.int64]:
        """Length of each example as a model sees it, shape (examples,): those of like length share a batch."""

    @abstractmethod
    def epoch(self, generator: np.random.Generator) -> Iterator[Batch]:
        """One pass to train on; ``generator`` draws order, crops and masks."""

    @abstractmethod
    def evaluation(self, generator: np.random.Generator) -> Iterator[Batch]:
        """One pass to evaluate on: from equal generators, equal batches."""

    @abstractmethod
    def apart(self, chosen: NDArray[np.int64], generator: np.random.Generator) -> Batch:
        """A batch of just these examples, a row for each: what is in a row depends on its example alone.

        Args:
            chosen: Their positions, shape (n,).
            generator: Draws crops and masks.
        """

    def __len__(self) -> int:
        return len(self.lengths)


def repeated(
    examples: Examples[Batch], *, epochs: int | None, steps: int | None, generator: np.random.Generator
) -> Iterator[Batch]:
    """``epochs`` passes, or exactly ``steps`` batches over as many passes as they take; one pass if neither is set.

    A pass without a batch ends it.
    """
    done = passes = 0
    limit = (epochs or 1) if steps is None else None
    while limit is None or passes < limit:
        before = done
        for batch in examples.epoch(generator):
            if steps is not None and done == steps:
                return
            yield batch
            done += 1
        if done == before:
            return
        passes += 1

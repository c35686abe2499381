"""Centred clipping: each update counts by its difference to what the server has learnt, clipped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from sfl.core import arrays
from sfl.core.aggregator import Aggregator, Needs
from sfl.core.task import Task, Update
from sfl.errors import ConfigError
from sfl.server.robust.base import answer, check_at_least, enough
from sfl.server.robust.gram import gram
from sfl.server.robust.stack import Stack
from sfl.types import Array, Parameters, StateTree

__all__ = ["CenteredClipping", "clipped_steps"]


def clipped_steps(products: Array, radius: float, iterations: int) -> Array:
    """Coefficients c with v = v₀ + Σ cᵢ (xᵢ − v₀) after some iterations of v ← v + (1/n) Σ (xᵢ − v) min(1, τ/‖xᵢ − v‖).

    Args:
        products: Inner products about v₀, shape (n, n).
        radius: τ.
        iterations: How many.

    Returns:
        Shape (n,).
    """
    norms = products.diagonal()
    finite = np.isfinite(norms)
    inner = np.where(finite[:, None] & finite, products, 0.0)
    steps = np.zeros(len(norms))
    for _ in range(iterations):
        turned = inner @ steps
        squares = np.maximum(np.where(finite, norms, np.inf) - 2.0 * turned + steps @ turned, 0.0)
        shares = radius / np.maximum(np.sqrt(squares), radius) / len(norms)
        steps = steps * (1.0 - shares.sum()) + shares
    return steps


@final
@dataclass(frozen=True)
class CenteredClipping(Aggregator):
    """v ← v + (1/n) Σ (xᵢ − v) min(1, τ/‖xᵢ − v‖), from the last round's v (Karimireddy, He and Jaggi, ICML 2021).

    It remembers v, zero before the first round: no site moves it by more than τ/n in an iteration, whatever it sends.
    The paper's bound is for sites with momentum, and for τ of the order of the honest updates' spread.

    | input | result |
    |---|---|
    | all updates within τ of v, one iteration | their mean |
    | an update of any finite size | moves v by at most τ/n in an iteration |
    | an update past 1e154 from v | counts as absent, in the mean of n |
    | NaN, inf | refused; in a run such a reply is rejected before |
    | a name that a site left out | zero there; one that all left out is remembered |

    Attributes:
        radius: τ, in units of an update's norm.
        iterations: Of the clipping within a round.
    """

    needs: ClassVar[Needs] = "individual"

    radius: float
    iterations: int = 1

    def __post_init__(self) -> None:
        check_at_least("iterations", self.iterations, 1)
        if not 0.0 < self.radius < np.inf:
            raise ConfigError(f"radius must be positive and finite, got {self.radius!r}.")

    def aggregate(self, updates: Iterable[Update]) -> Update:
        """One round from v = 0."""
        return self._moved(updates, {})[0]

    def step(self, updates: Iterable[Update], task: Task, state: StateTree) -> tuple[Update, StateTree]:  # noqa: ARG002
        """One round from what it remembers."""
        return self._moved(updates, state or {})

    def _moved(self, updates: Iterable[Update], before: Parameters) -> tuple[Update, Parameters]:
        stack = Stack.of(updates)
        enough("", stack)
        steps = clipped_steps(gram(stack, before), self.radius, self.iterations)
        rest, at = 1.0 - steps.sum(), stack.aligned(before)
        delta = stack.combined(steps)
        for name, value in delta.items():
            flat = value.reshape(-1)
            flat += np.asarray(rest * at(name, slice(None)), value.dtype)
        return answer(delta, stack), {**before, **arrays.copy(delta)}

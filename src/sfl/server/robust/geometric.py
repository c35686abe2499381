"""The geometric median, computed without looking at the updates again (RFA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from sfl.errors import CompositionError, ConfigError
from sfl.server.robust.base import RobustRule, check_at_least
from sfl.server.robust.gram import gram, squared_distances
from sfl.server.robust.stack import Stack
from sfl.types import Array, Parameters

__all__ = ["GeometricMedian", "weiszfeld"]

_FAR = 1e150  # past this a squared distance has no float64


def weiszfeld(products: Array, smoothing: float, iterations: int, tolerance: float) -> Array:
    """Weights of the points in their geometric median (Weiszfeld 1937; smoothed: Pillutla et al. 2022, Algorithm 2).

    z = Σ wᵢ xᵢ with wᵢ ∝ 1 / max(ν, ‖z − xᵢ‖), and ‖z − xᵢ‖² = Gᵢᵢ − 2(Gw)ᵢ + wᵀGw: no iteration sees a point.

    Args:
        products: Inner products about any centre near the median, shape (n, n).
        smoothing: ν, as a share of the median distance from that centre.
        iterations: At most so many.
        tolerance: Stop when no weight moves by more.

    Returns:
        Shape (n,), positive, of sum one.
    """
    norms = products.diagonal()
    least = max(smoothing * float(np.median(np.sqrt(norms))), 1e-300)
    weights = np.full(len(norms), 1.0 / len(norms))
    for _ in range(iterations):
        turned = products @ weights
        distances = np.sqrt(np.maximum(norms - 2.0 * turned + weights @ turned, 0.0))
        inverse = least / np.maximum(distances, least)
        updated = inverse / inverse.sum()
        moved = float(np.abs(updated - weights).max())
        weights = updated
        if moved <= tolerance:
            break
    return weights


@final
@dataclass(frozen=True)
class GeometricMedian(RobustRule):
    """The point with the smallest sum of distances to all updates (Pillutla, Kakade and Harchaoui, IEEE TSP 2022).

    The products are taken about the medoid, the update with the smallest sum of distances: an outlier, however large,
    does not take the digits of the others.

    | input | result |
    |---|---|
    | equal updates, or a majority of equal ones | that update, to the smoothing |
    | a minority of any finite size | stays within a bound that follows from the others alone |
    | an update at a distance past 1e150 | counts as absent |
    | NaN, inf | refused; in a run such a reply is rejected before |
    | a name that a site left out | zero there |

    Attributes:
        smoothing: ν as a share of the median distance from the medoid: no update's weight grows beyond 1/ν.
        iterations: At most so many; they cost n² each, whatever the model's size.
        tolerance: Stop when no weight moves by more.
    """

    smoothing: float = 1e-6
    iterations: int = 1000
    tolerance: float = 1e-12

    def __post_init__(self) -> None:
        check_at_least("iterations", self.iterations, 1)
        check_at_least("tolerance", self.tolerance, 0.0)
        if not 0.0 < self.smoothing < 1.0:
            raise ConfigError(f"smoothing must be in (0, 1), got {self.smoothing!r}.")

    def require(self, cohort: int) -> None:
        """A majority to speak of."""
        if cohort < 3:
            raise CompositionError(
                f"the geometric median must have at least 3 updates in a round, got {cohort}: of fewer no point is "
                "better than another. Let more sites take part, or take the mean."
            )

    def shortage(self, count: int) -> str:  # noqa: ARG002
        """None: a round that lost sites goes on."""
        return ""

    def combine(self, stack: Stack) -> Parameters:
        """Σ wᵢ xᵢ with Weiszfeld's weights."""
        distances = np.sqrt(squared_distances(stack))
        medoid = int(np.minimum(distances, _FAR).sum(axis=1).argmin())
        near = np.flatnonzero(distances[medoid] < _FAR)
        close = stack.subset(near.tolist())
        products = gram(close, int(np.searchsorted(near, medoid)))
        return close.combined(weiszfeld(products, self.smoothing, self.iterations, self.tolerance))

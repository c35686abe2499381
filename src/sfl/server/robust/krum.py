"""Rules that choose among the updates by their distances: Krum, Multi-Krum, Bulyan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from sfl.errors import ConfigError
from sfl.server.robust.base import RobustRule, check_at_least
from sfl.server.robust.gram import distances_between
from sfl.server.robust.stack import Stack
from sfl.types import Array, Parameters

__all__ = ["Bulyan", "Krum", "MultiKrum", "krum_scores"]


def krum_scores(distances: Array, neighbours: int) -> Array:
    """Σ of each update's squared distances to its nearest ``neighbours`` (Blanchard et al. 2017, section 4).

    Args:
        distances: Squared, shape (n, n), zero on the diagonal.
        neighbours: How many others count, at most n − 1.

    Returns:
        Shape (n,).
    """
    others = distances + np.where(np.eye(len(distances), dtype=bool), np.inf, 0.0)
    return np.sort(others, axis=1)[:, :neighbours].sum(axis=1)


def ranked(distances: Array, neighbours: int) -> Array:
    """Rows from the best score to the worst. Where one neighbour decides, two that are each other's tie: then that with
    the smaller sum of all distances comes first, and of equals the first in site order.
    """
    return np.lexsort((distances.sum(axis=1), krum_scores(distances, neighbours)))


@final
@dataclass(frozen=True)
class MultiKrum(RobustRule):
    """The mean of the ``keep`` updates with the best Krum scores (Blanchard et al., NeurIPS 2017).

    An update's score is the sum of its squared distances to its n − f − 2 nearest others; ties go to the smaller sum of
    all distances, then to the first in site order. n ≥ 2f + 3, or the rule is refused.

    | input | result |
    |---|---|
    | equal updates | that update |
    | an update of any finite size | its score is the worst; an inf distance counts as such |
    | NaN, inf | refused; in a run such a reply is rejected before |
    | a name that a site left out | zero there |

    Attributes:
        byzantine: f, the number of sites that may lie.
        keep: m, how many are averaged; by default n − f. One is Krum.
        projection: Measure distances after a random projection to so many coordinates; by default on all.
    """

    byzantine: int
    keep: int | None = None
    projection: int | None = None

    def __post_init__(self) -> None:
        _check(self.byzantine, self.projection)
        if self.keep is not None:
            check_at_least("keep", self.keep, 1)

    def shortage(self, count: int) -> str:
        """n ≥ 2f + 3, and no more are kept than there are."""
        if self.keep is not None and self.keep > count:
            return f"keep must be at most the {count} updates of a round, got {self.keep}. Lower it."
        return few("Krum", "2f + 3", 2 * self.byzantine + 3, count, self.byzantine, (count - 3) // 2)

    def combine(self, stack: Stack) -> Parameters:
        """The mean of the best."""
        count = len(stack)
        order = ranked(distances_between(stack, self.projection), count - self.byzantine - 2)
        return mean_of(stack, order[: self.keep or count - self.byzantine])


@final
@dataclass(frozen=True)
class Krum(RobustRule):
    """The one update with the smallest sum of squared distances to its n − f − 2 nearest (Blanchard et al. 2017).

    See ``MultiKrum``, of which it is ``keep=1``: it throws away all but one site's work in a round.

    Attributes:
        byzantine: f, the number of sites that may lie; n ≥ 2f + 3.
        projection: Measure distances after a random projection to so many coordinates; by default on all.
    """

    byzantine: int
    projection: int | None = None

    def __post_init__(self) -> None:
        _check(self.byzantine, self.projection)

    @property
    def _multi(self) -> MultiKrum:
        return MultiKrum(self.byzantine, keep=1, projection=self.projection)

    def shortage(self, count: int) -> str:
        """n ≥ 2f + 3."""
        return self._multi.shortage(count)

    def combine(self, stack: Stack) -> Parameters:
        """The best update."""
        return self._multi.combine(stack)


@final
@dataclass(frozen=True)
class Bulyan(RobustRule):
    """Krum again and again, then a trimmed mean (El Mhamdi, Guerraoui and Rouault, ICML 2018, section 4).

    Krum chooses θ = n − 2f updates, one after the other, each among those that are left. Of every coordinate the mean
    of the θ − 2f values nearest to their median is taken. n ≥ 4f + 3, or the rule is refused.

    With n′ updates left Krum sums n′ − f − 2 distances, at least one: with f = 1 none would be left for the last.

    | input | result |
    |---|---|
    | equal updates | that update |
    | an update of any finite size | not chosen, or trimmed in each coordinate where it stands out |
    | NaN, inf | refused; in a run such a reply is rejected before |
    | a name that a site left out | zero there |

    Attributes:
        byzantine: f, the number of sites that may lie.
        projection: Measure distances after a random projection to so many coordinates; by default on all.
    """

    byzantine: int
    projection: int | None = None

    def __post_init__(self) -> None:
        _check(self.byzantine, self.projection)

    def shortage(self, count: int) -> str:
        """n ≥ 4f + 3."""
        return few("Bulyan", "4f + 3", 4 * self.byzantine + 3, count, self.byzantine, (count - 3) // 4)

    def combine(self, stack: Stack) -> Parameters:
        """The trimmed mean of those that Krum chooses."""
        chosen = self._chosen(distances_between(stack, self.projection))
        keep = len(chosen) - 2 * self.byzantine

        def near_median(values: Array) -> Array:
            off = np.abs(values - np.median(values, axis=1, keepdims=True))
            nearest = np.argsort(off, axis=1, kind="stable")[:, :keep]
            return np.take_along_axis(values, nearest, axis=1).mean(axis=1)

        return stack.subset(chosen).coordinatewise(near_median)

    def _chosen(self, distances: Array) -> list[int]:
        left = list(range(len(distances)))
        chosen: list[int] = []
        while len(chosen) < len(distances) - 2 * self.byzantine:
            neighbours = min(max(len(left) - self.byzantine - 2, 1), len(left) - 1)
            chosen.append(left.pop(int(ranked(distances[np.ix_(left, left)], neighbours)[0])))
        return sorted(chosen)


def mean_of(stack: Stack, rows: Array) -> Parameters:
    """The mean of some rows."""
    weights = np.zeros(len(stack))
    weights[rows] = 1.0 / len(rows)
    return stack.combined(weights)


def few(rule: str, law: str, least: int, count: int, byzantine: int, most: int) -> str:
    """What to say of a round of ``count`` updates under a rule that needs ``least``; empty if it has them."""
    if count >= least:
        return ""
    remedy = f"With {count} it can stand {most} at most" if most >= 0 else "It needs three at the very least"
    return (
        f"{rule} must have n >= {law} = {least} updates in a round to stand f = {byzantine} that lie, got n = {count}. "
        f"{remedy}: lower byzantine, or let more sites take part."
    )


def _check(byzantine: int, projection: int | None) -> None:
    check_at_least("byzantine", byzantine, 0)
    if projection is not None and projection < 1:
        raise ConfigError(f"projection must be at least 1 coordinate, got {projection}. Leave it out for all.")

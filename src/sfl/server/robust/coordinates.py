"""Rules on each coordinate by itself: the trimmed mean and the median (Yin et al., ICML 2018)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from sfl.errors import CompositionError, ConfigError
from sfl.server.robust.base import RobustRule
from sfl.server.robust.stack import Stack
from sfl.types import Array, Parameters

__all__ = ["CoordinateMedian", "TrimmedMean", "median", "trimmed_mean"]


def trimmed_mean(values: Array, trim: int) -> Array:
    """The mean of each row without its ``trim`` smallest and largest values. ``values`` is overwritten."""
    if trim:
        values.sort(axis=1)
    return values[:, trim : values.shape[1] - trim].mean(axis=1)


def median(values: Array) -> Array:
    """The median of each row: the mean of the two in the middle where their number is even; overwrites ``values``."""
    return trimmed_mean(values, (values.shape[1] - 1) // 2)


@final
@dataclass(frozen=True)
class TrimmedMean(RobustRule):
    """The mean of each coordinate without its ⌊ratio · n⌋ smallest and largest values (Yin et al. 2018, Definition 2).

    A ratio above 0 must trim: ⌊0.1 · n⌋ is 0 below ten sites, and protects from nobody. Such a round is refused. With
    a ratio of exactly 0 it is the unweighted mean, which no run is begun with.

    | input | result |
    |---|---|
    | equal updates | that update |
    | up to ⌊ratio · n⌋ updates of any finite size | every coordinate stays between values of the others |
    | NaN, inf | refused; in a run such a reply is rejected before |
    | a name that a site left out | zero there |

    Attributes:
        ratio: Share of the updates that is trimmed at each end, in [0, 0.5).
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 0.5:
            raise ConfigError(f"ratio must be in [0, 0.5), got {self.ratio!r}: it is trimmed at each end.")

    def trim(self, count: int) -> int:
        """How many of ``count`` values are trimmed at each end; a ratio of 1/n means one, whatever 1/n rounds to."""
        return min(math.floor(self.ratio * count + 1e-9), (count - 1) // 2)

    def require(self, cohort: int) -> None:
        """A trim that trims."""
        if reason := self._idle(cohort):
            raise CompositionError(reason)

    def shortage(self, count: int) -> str:
        """A trim that trims, if one is asked for."""
        return self._idle(count) if self.ratio > 0.0 else ""

    def combine(self, stack: Stack) -> Parameters:
        """The trimmed mean."""
        trim = self.trim(len(stack))
        return stack.coordinatewise(lambda values: trimmed_mean(values, trim))

    def _idle(self, count: int) -> str:
        if self.trim(count) > 0:
            return ""
        remedy = f"Set it to 1/{count} = {1 / count:.3g} or more" if count > 2 else "Let at least 3 sites take part"
        return (
            f"trim ratio must trim at least one of n = {count} updates at each end, got {self.ratio:g}, "
            f"floor({self.ratio:g} * {count}) = 0: it protects from nobody. {remedy}, or take the mean."
        )


@final
@dataclass(frozen=True)
class CoordinateMedian(RobustRule):
    """The median of each coordinate (Yin et al. 2018, Definition 1); of an even number the mean of the middle two.

    | input | result |
    |---|---|
    | one or two updates | their mean: nothing is robust with fewer than three, and no run is begun so |
    | a minority of any finite size | every coordinate stays between values of the others |
    | NaN, inf | refused; in a run such a reply is rejected before |
    | a name that a site left out | zero there |
    """

    def require(self, cohort: int) -> None:
        """A middle to speak of."""
        if cohort < 3:
            raise CompositionError(
                f"the median must have at least 3 updates in a round, got {cohort}: of fewer it is the mean. "
                "Let more sites take part, or take the mean."
            )

    def shortage(self, count: int) -> str:  # noqa: ARG002
        """None: a round that lost sites goes on."""
        return ""

    def combine(self, stack: Stack) -> Parameters:
        """The median."""
        return stack.coordinatewise(median)

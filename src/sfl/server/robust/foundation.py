"""FoundationFL: the plain rules, with synthetic updates beside those of the sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from sfl.errors import ConfigError
from sfl.server.robust.base import RobustRule, check_at_least
from sfl.server.robust.coordinates import median, trimmed_mean
from sfl.server.robust.stack import Stack
from sfl.types import Array, Parameters

__all__ = ["FoundationFL", "extremeness"]


def extremeness(stack: Stack) -> Array:
    """sᵢ = min(‖gᵢ − g_max‖, ‖gᵢ − g_min‖), squared, with g_max and g_min the largest and smallest of each coordinate.

    Returns:
        Shape (n,).
    """
    above, below = np.zeros(len(stack)), np.zeros(len(stack))
    with np.errstate(over="ignore"):
        for _, _, block in stack.blocks():
            above += np.square(block.max(axis=0) - block).sum(axis=1)
            below += np.square(block - block.min(axis=0)).sum(axis=1)
    return np.minimum(above, below)


@final
@dataclass(frozen=True)
class FoundationFL(RobustRule):
    """Trimmed mean or median of the updates and m copies of one of them (Fang et al., NDSS 2025).

    The one is the update that is farthest from both extremes: i* = argmax min(‖gᵢ − g_max‖, ‖gᵢ − g_min‖), the first
    in site order of equals. f values are trimmed at each end of the n + m. n ≥ 2f + 1, or the rule is refused.

    No bound holds once a liar is chosen himself: opposite to another liar in every coordinate, he is far from both
    extremes, and his copies count like his own update. The median still has an honest majority as long as
    f + m < n − f; the trimmed mean, which trims f alone, does not.

    This is the method of the paper. What ``--aggregation foundation-fl`` names is ``CosineTrust``.

    | input | result |
    |---|---|
    | equal updates | that update |
    | f updates of any finite size, none chosen | every coordinate stays between values of the others |
    | one of them chosen | see above |
    | NaN, inf | refused; in a run such a reply is rejected before |
    | a name that a site left out | zero there |

    Attributes:
        byzantine: f, the number of sites that may lie.
        rule: Which rule is applied to all of them.
        copies: m; by default half as many as there are updates, rounded up.
    """

    byzantine: int
    rule: Literal["trimmed-mean", "median"] = "trimmed-mean"
    copies: int | None = None

    def __post_init__(self) -> None:
        check_at_least("byzantine", self.byzantine, 0)
        if self.rule not in ("trimmed-mean", "median"):
            raise ConfigError(f"rule must be trimmed-mean or median, got {self.rule!r}.")
        if self.copies is not None:
            check_at_least("copies", self.copies, 0)

    def shortage(self, count: int) -> str:
        """An honest majority."""
        least = 2 * self.byzantine + 1
        if count >= least:
            return ""
        return (
            f"FoundationFL must have n >= 2f + 1 = {least} updates in a round to stand f = {self.byzantine} that lie, "
            f"got n = {count}. Lower byzantine, or let more sites take part."
        )

    def combine(self, stack: Stack) -> Parameters:
        """The rule over updates and copies."""
        chosen = int(extremeness(stack).argmax())
        copies = -(-len(stack) // 2) if self.copies is None else self.copies
        columns = [*range(len(stack)), *[chosen] * copies]

        def apply(values: Array) -> Array:
            extended = values[:, columns]
            return median(extended) if self.rule == "median" else trimmed_mean(extended, self.byzantine)

        return stack.coordinatewise(apply)

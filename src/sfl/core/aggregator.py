"""Aggregators: many updates become one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from sfl.core import arrays
from sfl.core.task import SERVER, Task, Update
from sfl.errors import RoundError
from sfl.types import Array, Parameters, StateTree

Needs = Literal["sum", "individual"]


class Aggregator(ABC):
    """Takes an iterable of updates in site order, returns their aggregate.

    Most need ``aggregate`` alone. One that remembers something from round to round, or looks at what was sent, defines
    ``init`` and ``step``.

    Attributes:
        needs: ``"sum"`` streams: each update is valid until the next is drawn, memory stays O(P), and secure
            aggregation can stand in for it. ``"individual"``, the safe default, receives copies that it may keep.
    """

    needs: ClassVar[Needs] = "individual"

    @property
    def rebuilds(self) -> str:
        """What was asked for, if an aggregate describes a new model by other numbers, so that what is remembered of the
        old ones, on the server or on a site, means nothing. Empty if it does not.
        """
        return ""

    def of_mean(self, mean: Update) -> Update | None:  # noqa: ARG002
        """The same aggregate from the weighted mean of updates alone, whose weight is the sum of theirs.

        Returns:
            ``None`` if it takes more than that; then no secure sum can stand in for it.
        """
        return None

    @abstractmethod
    def aggregate(self, updates: Iterable[Update]) -> Update:
        """The aggregate: an update named ``"server"`` whose arrays belong to the caller.

        Its metrics, if it has any, are among the figures of the round.

        Raises:
            RoundError: If there is no update.
        """

    def require(self, cohort: int) -> None:  # noqa: B027 - most are content with any
        """Whether rounds of ``cohort`` planned sites can be aggregated as promised; asked before a run.

        Raises:
            CompositionError: If they cannot, with what to change.
        """

    def screen(self, update: Update) -> None:  # noqa: B027 - most take any update that keeps the contract
        """Whether one update may go in; asked as it arrives, before the round is aggregated.

        Raises:
            UpdateError: If not: the site is rejected, with these words.
        """

    def init(self, parameters: Parameters) -> StateTree:  # noqa: ARG002
        """What it remembers before the first round of a model like this."""
        return None

    def step(self, updates: Iterable[Update], task: Task, state: StateTree) -> tuple[Update, StateTree]:  # noqa: ARG002
        """One round: the aggregate, and what it remembers after it. Pure: ``state`` is left as it is.

        Args:
            updates: As ``aggregate`` takes them.
            task: What they answer; its parameters are those that the sites were sent.
            state: What it remembered before.

        Raises:
            RoundError: If there are too few updates.
        """
        return self.aggregate(updates), state


@dataclass(frozen=True, slots=True)
class WeightedMean(Aggregator):
    """The mean of deltas weighted by ``weight``: Σ wᵢ δᵢ / Σ wᵢ (McMahan et al. 2017, Algorithm 1).

    One fused pass per update, in site order. A name that some site left out counts as zero there. Integer arrays are
    averaged in float64.

    Attributes:
        wide: Add up in float64 whatever the arrays are: so that rounding moves a sum of n updates by no more than
            n² · 2^-53 of the largest, as a mechanism counts on. In float32 thousands of updates may move it as far as
            one of them.

    | input | result |
    |---|---|
    | one site | that site's delta, to rounding |
    | a zero delta | counts with its weight |
    | NaN, inf, wrong shape | never arrives: rejected before |
    | weight × delta past the dtype's range | inf, with numpy's warning |
    """

    needs: ClassVar[Needs] = "sum"

    wide: bool = False

    def of_mean(self, mean: Update) -> Update:
        """It is the mean."""
        return mean

    def aggregate(self, updates: Iterable[Update]) -> Update:
        """The weighted mean; see the class."""
        total, weight = weighted_sum(updates, wide=self.wide)
        for value in total.values():
            value /= weight
        return Update(site=SERVER, delta=total, weight=weight)


@dataclass(frozen=True, slots=True)
class Sum(Aggregator):
    """The plain sum of deltas, weights ignored.

    Attributes:
        wide: See ``WeightedMean``.
    """

    needs: ClassVar[Needs] = "sum"

    wide: bool = False

    def of_mean(self, mean: Update) -> Update:
        """Times the number of updates; all must weigh one."""
        return replace(mean, delta={name: np.asarray(value * mean.weight) for name, value in mean.delta.items()})

    def aggregate(self, updates: Iterable[Update]) -> Update:
        """Σ δᵢ; its weight is the number of updates."""
        count = 0.0
        total: Parameters = {}
        for update in updates:
            _accumulate(total, update, 1.0, wide=self.wide)
            count += 1.0
            del update  # what it holds is let go before the next is drawn
        return Update(site=SERVER, delta=_some(total, count), weight=count)


def weighted_sum(updates: Iterable[Update], *, wide: bool = False) -> tuple[Parameters, float]:
    """Σ wᵢ δᵢ and Σ wᵢ, streaming.

    Args:
        updates: In site order.
        wide: Add up in float64; see ``WeightedMean``.

    Raises:
        RoundError: If there is no update.
    """
    weight = 0.0
    total: Parameters = {}
    for update in updates:
        _accumulate(total, update, update.weight, wide=wide)
        weight += update.weight
        del update  # what it holds is let go before the next is drawn
    return _some(total, weight), weight


def _accumulate(total: Parameters, update: Update, weight: float, *, wide: bool) -> None:
    first = {name: value for name, value in update.delta.items() if name not in total}
    dtypes = {name: np.dtype(np.float64) if wide else sum_dtype(value) for name, value in first.items()}
    total |= arrays.empty({name: (value.shape, dtypes[name]) for name, value in first.items()})
    for name, value in update.delta.items():
        if name in first:
            np.multiply(value, weight, out=total[name], dtype=total[name].dtype)
        else:
            arrays.add_scaled(total[name], value, weight)


def sum_dtype(value: Array) -> np.dtype[Any]:
    """The dtype in which arrays like this are added up: float32 or float64, whatever they are."""
    return value.dtype if value.dtype.kind == "f" and value.dtype.itemsize >= 4 else np.dtype(np.float64)


def _some(total: Parameters, weight: float) -> Parameters:
    if weight <= 0.0:
        raise RoundError("an aggregate must have at least one update, got none.")
    return total

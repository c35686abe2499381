"""What the robust rules share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from sfl.core.aggregator import Aggregator, Needs
from sfl.core.task import SERVER, Update
from sfl.errors import CompositionError, ConfigError, RoundError
from sfl.server.robust.stack import Stack
from sfl.types import Parameters

__all__ = ["RobustRule", "answer", "check_at_least", "enough"]


class RobustRule(Aggregator):
    """A rule that looks at every update and remembers nothing.

    It takes updates as they are: what a site says of its number of examples does not weigh, and the aggregate's weight
    is the number of updates.
    """

    needs: ClassVar[Needs] = "individual"

    @abstractmethod
    def shortage(self, count: int) -> str:
        """Why ``count`` updates are not aggregated as promised, and what to change; empty if they are."""

    @abstractmethod
    def combine(self, stack: Stack) -> Parameters:
        """The aggregate of a stack that is large enough, in arrays of its own."""

    def require(self, cohort: int) -> None:
        """See ``Aggregator.require``."""
        if reason := self.shortage(cohort):
            raise CompositionError(reason)

    def aggregate(self, updates: Iterable[Update]) -> Update:
        """The aggregate; see the class.

        Raises:
            RoundError: If there are too few updates.
            UpdateError: If one of them is not finite.
        """
        stack = Stack.of(updates)
        enough(self.shortage(len(stack)), stack)
        return answer(self.combine(stack), stack)


def enough(shortage: str, stack: Stack) -> None:
    """Whether a round can be aggregated.

    Raises:
        RoundError: If not, or if there is no update.
    """
    if len(stack) == 0:
        raise RoundError("an aggregate must have at least one update, got none.")
    if shortage:
        raise RoundError(shortage)


def answer(delta: Parameters, stack: Stack) -> Update:
    """The aggregate as an update: its weight is the number of those that went in."""
    return Update(SERVER, delta, float(len(stack)))


def check_at_least(name: str, value: float, least: float) -> None:
    """Whether an option is a number that is large enough.

    Raises:
        ConfigError: If not.
    """
    if isinstance(value, bool) or not least <= value < float("inf"):
        raise ConfigError(f"{name} must be {least:g} or more and finite, got {value!r}.")

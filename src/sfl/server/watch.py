"""What an audit's adversary takes down, where the server runs: it knows every direction, and no coin."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import numpy as np

from sfl.core.aggregator import Aggregator, Needs, sum_dtype
from sfl.core.events import AggregationFinished, RoundStarted
from sfl.core.task import SERVER, Update
from sfl.privacy.audit.directions import Directions
from sfl.server.callbacks import Callback, RunView
from sfl.types import Array, Parameters, StateTree

__all__ = ["OwnParts", "Watch", "seen_by"]


@final
@dataclass(frozen=True)
class Watch(Callback):
    """Takes down how far each round's global model moved in each canary's direction.

    The figures lie in the run's state, so they come home from every engine.

    Attributes:
        directions: All canaries' directions.
    """

    directions: Directions

    def on_round_started(self, run: RunView, event: RoundStarted) -> None:  # noqa: ARG002
        """Where the model is before the round."""
        run.memory["before"] = self.directions.project(run.parameters)

    def on_aggregation_finished(self, run: RunView, event: AggregationFinished) -> None:  # noqa: ARG002
        """How far it has moved."""
        after = self.directions.project(run.parameters)
        moved = after - cast("Array", run.memory["before"])
        run.memory["seen"] = [*cast("list[Any]", run.memory.get("seen", [])), moved]


@final
@dataclass(frozen=True)
class OwnParts(Aggregator):
    """Of each canary's own update its own coordinates, and nothing else: what a curious server looks at.

    Directions do not overlap, so the aggregate holds every canary's own figure, and ``Watch`` reads it like any other.

    Attributes:
        directions: All canaries' directions.
        sites: The canaries' names, in order.
    """

    needs: ClassVar[Needs] = "sum"

    directions: Directions
    sites: tuple[str, ...]

    def aggregate(self, updates: Iterable[Update]) -> Update:
        """All canaries' own parts, side by side; its weight is their number."""
        places = {site: index for index, site in enumerate(self.sites)}
        parts: Parameters = {}
        count = 0
        for update in updates:
            parts = parts or {name: np.zeros(value.shape, sum_dtype(value)) for name, value in update.delta.items()}
            if update.site in places:
                self.directions.copy_into(parts, update.delta, places[update.site])
            count += 1
        return Update(SERVER, parts, float(max(count, 1)))


def seen_by(memory: StateTree) -> Array:
    """What ``Watch`` took down, shape (rounds, canaries)."""
    return np.asarray(cast("dict[str, Any]", memory)["seen"], np.float64)

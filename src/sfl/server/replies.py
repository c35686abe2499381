"""What becomes of replies on the server: the contract's own look, the aggregate, the mean of figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from sfl.core import arrays, check
from sfl.core.aggregator import Aggregator
from sfl.core.task import EVALUATE, EXAMPLE_EPSILON, FIT, Reply, Status, Task, Update
from sfl.core.unpack import unpacked
from sfl.errors import UpdateError
from sfl.server.job import Job
from sfl.types import Metrics, Parameters, StateTree

__all__ = ["MetricsMean", "aggregated", "screened"]


def screened(reply: Reply, task: Task, expected: Parameters, job: Job) -> Reply:
    """The server's own look: nothing that breaks the contract reaches an aggregator, whoever sent it.

    Where a job fixes the weight of every update, it has that weight, whatever a site says.

    Args:
        reply: What arrived.
        task: What it answers.
        expected: What an update of it may hold.
        job: The job.
    """
    update = reply.update
    if reply.status is not Status.USED:
        return replace(reply, update=None)
    try:
        if update is None or update.site != reply.site:
            raise UpdateError(f"{reply.site}: a used reply must hold the site's own update, got {_whose(update)}.")
        if task.name == FIT:  # zeros are left out, and floats coded; only here is known what size an array may have
            update = replace(update, delta=unpacked(update.delta, expected))
            reply = replace(reply, update=update)
        if task.name in (FIT, EVALUATE):
            check.check_update(update, expected, known_finite=reply.known_finite)
        else:  # a task of a workflow's own answers with what arrays it likes
            check.check_arrays(update)
        check.check_metrics(update.site, update.metrics)
        if task.name == FIT:
            if job.program.fixed_weight is not None:
                update = replace(update, weight=job.program.fixed_weight)
                reply = replace(reply, update=update)
            job.aggregator.screen(update)
    except UpdateError as error:
        return Reply(reply.site, Status.REJECTED, reason=str(error), seconds=reply.seconds)
    return reply


def _whose(update: Update | None) -> str:
    return "none" if update is None else f"that of {update.site!r}"


def aggregated(
    aggregator: Aggregator, updates: Iterable[Update], task: Task, state: StateTree
) -> tuple[Update, StateTree]:
    """The aggregate, and what the aggregator remembers; one that looks at individuals is given copies to keep."""
    if aggregator.needs == "individual":
        updates = [replace(update, delta=arrays.copy(update.delta)) for update in updates]
    return aggregator.step(updates, task, state)


class MetricsMean:
    """Weighted mean of what the used sites reported; a figure that a site left out counts only where it is."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._weights: defaultdict[str, float] = defaultdict(float)
        self._largest: Metrics = {}  # no mean says what an ε is: that of the site that is worst off does

    def watch(self, updates: Iterable[Update]) -> Iterator[Update]:
        """Pass updates on, and look at each."""
        for update in updates:
            self.count += 1
            if EXAMPLE_EPSILON in update.metrics:
                self._largest[EXAMPLE_EPSILON] = max(
                    self._largest.get(EXAMPLE_EPSILON, 0.0), update.metrics[EXAMPLE_EPSILON]
                )
            for name, value in update.metrics.items():
                self._sums[name] += update.weight * value
                self._weights[name] += update.weight
            yield update
            del update

    def result(self) -> Metrics:
        """The means."""
        return {name: total / self._weights[name] for name, total in self._sums.items()} | self._largest

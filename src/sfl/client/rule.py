"""The half of an algorithm that runs on a site, around its client's own training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from sfl.client.base import BaseFederatedClient
from sfl.core.task import Task, Update
from sfl.core.terms import LocalTerms
from sfl.types import Array, Config, Metrics, Parameters

__all__ = ["LocalRule", "SiteWork"]


class SiteWork(Protocol):
    """A site, as a rule sees it that does tasks of its own."""

    @property
    def site(self) -> str:
        """Its name."""
        ...

    @property
    def memory(self) -> dict[str, Any]:
        """What it remembers: ``client.state``."""
        ...

    def fit(self, task: Task) -> Update:
        """Train as for any task, through the chain: the update that may leave."""
        ...


@dataclass(frozen=True)
class LocalRule:
    """What a site does around ``compute_update``; by itself, nothing. A frozen dataclass: it travels with the job.

    What it must remember from round to round is in ``client.state``, under a name of its own.

    Attributes:
        asks: What clients must heed for it (``sfl.core.terms``).
        tasks: Names of tasks of the algorithm's own, which ``run_task`` does.
    """

    asks: ClassVar[frozenset[str]] = frozenset()
    tasks: ClassVar[frozenset[str]] = frozenset()

    def carried(self, model: Parameters) -> Parameters:
        """The arrays of a task that trains this model, and of its answer; what they hold does not matter."""
        return model

    def model(self, sent: Mapping[str, Array]) -> Parameters:
        """The model among the arrays that were sent."""
        return dict(sent)

    def before(
        self,
        client: BaseFederatedClient,
        sent: Mapping[str, Array],
        config: Config,
        terms: LocalTerms,
    ) -> LocalTerms:
        """What the client's training of the model heeds."""
        return terms

    def after(
        self,
        client: BaseFederatedClient,
        sent: Mapping[str, Array],
        delta: Parameters,
    ) -> Parameters:
        """What leaves, from what the training made of the model. The arrays may be lent: they may not be kept."""
        return delta

    def run_task(self, work: SiteWork, task: Task) -> Update:
        """Do a task of the algorithm's own. Of an update nothing may leave but what ``work.fit`` returns, or follows
        from it: that has passed the site's protections.
        """
        raise NotImplementedError(f"{type(self).__name__} does no task named {task.name!r} of {work.site}.")

    def figures(self, client: BaseFederatedClient, config: Config) -> Metrics:
        """What an evaluation reports beside the global model's figures."""
        return {}

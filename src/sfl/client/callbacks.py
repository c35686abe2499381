"""Callbacks on the sites: code of a job's own that is called around each task, where the site's data are."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from typing import Any

from sfl.core.moments import check_moments
from sfl.core.task import FIT, Reply, Task
from sfl.utils.memory import trim

__all__ = ["SiteCallback", "TrimSiteMemory"]


class SiteCallback:
    """Override the moments that matter. It travels with the job, so it is a frozen dataclass or has no attributes.

    What ``on_task_started`` or ``on_task_finished`` raises fails the site's task.

    Raises:
        TypeError: As a subclass is made whose ``on_...`` method is none of a known moment.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_moments(cls, SiteCallback)

    def on_task_started(self, site: str, task: Task) -> None:
        """The site has been given a task; its client has not seen it yet."""

    def on_task_finished(self, site: str, task: Task, reply: Reply) -> None:
        """The client has done it, and ``reply`` is what will leave: the update has passed the protections."""

    def on_task_failed(self, site: str, task: Task, error: BaseException) -> None:
        """It was not done, or broke the contract; ``error`` is the site's own, with its words."""

    def on_site_closed(self, site: str) -> None:
        """The site's client is let go: the run is over, or a task has failed."""


@dataclass(frozen=True, kw_only=True)
class TrimSiteMemory(SiteCallback):
    """Gives a site's memory back after rounds that it trained in.

    It works in the site's own process: a script in a process of its own keeps its memory to itself.

    Attributes:
        every: After each n-th round; 0 never.
        cuda: Whether torch's cache on a GPU is emptied after each round.
    """

    every: int = 0
    cuda: bool = False

    def on_task_finished(self, site: str, task: Task, reply: Reply) -> None:
        """Collect, and give back."""
        if task.name != FIT:
            return
        if self.every and task.round % self.every == 0:
            gc.collect()
            trim()
        torch: Any = sys.modules.get("torch")
        if self.cuda and torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

"""A federation in which a test plays the engine, and anybody's part it likes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from secure_sites import played
from sfl.core.secure import Total
from sfl.core.task import FIT, Task, Update
from sfl.io.site_store import SecretStore
from sfl.privacy.secagg import SecAgg
from sfl.privacy.secagg.site import SecAggSite
from sfl.types import Parameters

STAGES = ("secagg-keys", "secagg-shares", FIT, "secagg-agree", "secagg-unmask")
AGREE, UNMASK = STAGES[3:]


@dataclass
class Federation:
    """Sites that answer what a server's half asks.

    Attributes:
        lost: By step, sites that do not answer it.
        tamper: Changes a site's task before it gets there: what a dishonest server would do.
        forge: Changes a site's answer: what a dishonest site would do.
    """

    secure: SecAgg
    n: int
    size: int = 50
    lost: Mapping[str, Collection[int]] = field(default_factory=dict[str, Collection[int]])
    tamper: Callable[[str, Task], Task] = lambda _, task: task
    forge: Callable[[str, Update], Update] = lambda _, update: update
    identities: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.n)
        self.names = [f"site-{number + 1:03d}" for number in range(self.n)]
        self.expected: Parameters = {"w": np.zeros((self.size,), np.float32), "count": np.zeros(2, np.int64)}
        self.updates: dict[str, Parameters] = {
            name: {
                "w": draw.normal(size=self.size).astype(np.float32),
                "count": draw.integers(-50, 50, 2),
            }
            for name in self.names
        }
        self.weights = dict.fromkeys(self.names, 1.0)
        self.sites: dict[str, SecAggSite] = {
            name: self.secure.site(name, SecretStore(None), self.identities.get(name)) for name in self.names
        }
        self.memory = self.secure.begin(self.expected, self.expected, self.names)
        self.masked: dict[str, Parameters] = {}
        self.refused: dict[str, str] = {}

    def run(self, round: int = 1) -> Total:
        """One round; what sites refuse is in ``refused``."""
        task = Task(FIT, round, {"w": np.zeros(self.size, np.float32), "count": np.zeros(2, np.int64)}, {"seed": 1})
        summing = self.secure.summing(task, self.names, self.expected, self.memory)
        return played(summing, self._answer, self.refused)

    def _answer(self, name: str, task: Task) -> Update | None:
        if self.names.index(name) in self.lost.get(task.name, ()):
            return None
        answer = self.forge(name, self.answer(name, self.tamper(name, task)))
        if task.name == FIT:
            self.masked[name] = answer.delta
        return answer

    def answer(self, name: str, task: Task) -> Update:
        """What one site answers."""
        site = self.sites[name]
        if task.name != FIT:
            return site.answer(task)
        opened = site.opened(task)
        assert not [key for key in opened.config if key.startswith("secagg")]
        return site.closed(Update(name, self.updates[name], self.weights[name]), task, self.expected)

    def plain(self, total: Total) -> Parameters:
        """The same mean without masks: words added up as they are."""
        fixed = self.secure.fixed.of(self.present)
        words = fixed.zeros(self.expected)
        for name in total.sites:
            words.add(fixed.encoded(self.updates[name], self.weights[name], self.expected))
        return fixed.decoded(words, self.expected)[0]

    @property
    def present(self) -> int:
        """Sites that have made keys."""
        return self.n - len(self.lost.get(STAGES[0], ()))


def with_config(task: Task, **config: Any) -> Task:
    """The task with other scalars."""
    return replace(task, config={**task.config, **config})

"""Swarm learning's half on a site: seal an update for another site, or add up what was sealed for this one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np

from sfl.client.rule import LocalRule, SiteWork
from sfl.core import quantise
from sfl.core.aggregator import Aggregator
from sfl.core.task import FIT, Task, Update
from sfl.errors import MissingExtraError, UpdateError
from sfl.io.tree import pack_tree, unpack_tree
from sfl.types import Array

KEY: Final = "swarm-key"
TRAIN: Final = "swarm-train"
AGGREGATE: Final = "swarm-aggregate"
READER: Final = "swarm/reader"
"""Under which a task to train carries the public key of the site that will aggregate."""

SEALED: Final = "sealed/"
"""What the names of sealed updates begin with, before the name of the site that sealed them."""

_STATE = "swarm"


@dataclass(frozen=True)
class SwarmRule(LocalRule):
    """What a site of a swarm does; ``sfl.server.algorithms.Swarm`` is the other half.

    Attributes:
        aggregator: How updates become one, on the site whose turn it is.
    """

    aggregator: Aggregator

    tasks: ClassVar[frozenset[str]] = frozenset({KEY, TRAIN, AGGREGATE})

    def run_task(self, work: SiteWork, task: Task) -> Update:
        """Make a key for this round, train and seal, or aggregate."""
        if task.name == KEY:
            return self._make_key(work)
        return self._train(work, task) if task.name == TRAIN else self._aggregate(work, task)

    def _make_key(self, work: SiteWork) -> Update:
        reader = _sealing().Reader(_purpose(work.site))
        work.memory[_STATE] = np.frombuffer(reader.private, np.uint8)
        return Update(work.site, {READER: np.frombuffer(reader.public, np.uint8)}, 1.0)

    def _train(self, work: SiteWork, task: Task) -> Update:
        model = {name: value for name, value in task.parameters.items() if name != READER}
        update = work.fit(Task(FIT, task.round, model, task.config))
        skeleton, tensors = pack_tree({"delta": dict(update.delta), "weight": update.weight})
        seal = _sealing().Seal(task.parameters[READER].tobytes(), 2, _purpose(str(task.config["aggregator"])))
        parts = {f"{SEALED}{place}": _bytes(seal.close(part)) for place, part in enumerate((skeleton, tensors))}
        return Update(work.site, parts, update.weight, update.metrics)

    def _aggregate(self, work: SiteWork, task: Task) -> Update:
        key = work.memory.pop(_STATE, None)
        if key is None:
            raise UpdateError(f"{work.site}: it must have made a key before it aggregates, got none of this round.")
        reader = _sealing().Reader(_purpose(work.site), key.tobytes())
        sites = sorted({name.split("/")[1] for name in task.parameters if name.startswith(SEALED)})
        return replace(self.aggregator.aggregate(self._opened(reader, task, sites)), site=work.site)

    @staticmethod
    def _opened(reader: object, task: Task, sites: list[str]) -> Iterator[Update]:
        """One after the other: only one of them lies open at a time, unless the aggregator keeps it."""
        for site in sites:
            parts = [task.parameters[f"{SEALED}{site}/{place}"].tobytes() for place in (0, 1)]
            skeleton, tensors = (reader.open(part, number, 2) for number, part in enumerate(parts))  # type: ignore[attr-defined]
            opened = unpack_tree(skeleton, tensors)
            yield Update(site, quantise.unpacked(opened["delta"]), float(opened["weight"]))


def _bytes(data: bytes) -> Array:
    return np.frombuffer(data, np.uint8)


def _purpose(site: str) -> bytes:
    return f"sfl swarm {site}".encode()


def _sealing():
    try:
        from sfl.privacy import sealed
    except ImportError:
        raise MissingExtraError("cryptography", "privacy") from None
    return sealed

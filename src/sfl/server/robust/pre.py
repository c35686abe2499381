"""What updates pass before a rule, so that it stands sites whose data differ: NNM and bucketing."""

from __future__ import annotations

import hashlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from sfl.core.aggregator import Aggregator, Needs
from sfl.core.arrays import blocks
from sfl.core.task import Task, Update
from sfl.errors import CompositionError
from sfl.server.robust.base import check_at_least, enough
from sfl.server.robust.gram import distances_between
from sfl.server.robust.stack import Stack
from sfl.types import Parameters, StateTree

__all__ = ["Bucketing", "NNM", "PreAggregated", "PreAggregation"]  # noqa: RUF022 - plain order


class PreAggregation(ABC):
    """Turns updates into fewer, or calmer ones."""

    @abstractmethod
    def left(self, count: int) -> int:
        """How many updates it makes of ``count``."""

    @abstractmethod
    def shortage(self, count: int) -> str:
        """Why ``count`` updates are not enough for it; empty if they are."""

    @abstractmethod
    def mix(self, stack: Stack) -> list[Update]:
        """The new updates, all of weight one."""


@final
@dataclass(frozen=True)
class NNM(PreAggregation):
    """Nearest-neighbour mixing: each update becomes the mean of its n − f nearest, itself among them.

    Allouah et al., AISTATS 2023: any (f, κ)-robust rule is then robust at the best order, κ = O(f/n), under
    heterogeneity. Of equally near updates the first in site order is taken, after the update itself. n > 2f.

    Attributes:
        byzantine: f, the number of sites that may lie.
        projection: Measure distances after a random projection to so many coordinates; by default on all.
    """

    byzantine: int
    projection: int | None = None

    def __post_init__(self) -> None:
        check_at_least("byzantine", self.byzantine, 0)

    def left(self, count: int) -> int:
        """As many."""
        return count

    def shortage(self, count: int) -> str:
        """An honest majority."""
        least = 2 * self.byzantine + 1
        if count >= least:
            return ""
        return (
            f"NNM must have n >= 2f + 1 = {least} updates in a round to stand f = {self.byzantine} that lie, "
            f"got n = {count}. Lower byzantine, or let more sites take part."
        )

    def mix(self, stack: Stack) -> list[Update]:
        """Every row's mean over its nearest."""
        count = len(stack)
        distances = distances_between(stack, self.projection) - np.eye(count)  # itself before all that equal it
        nearest = np.argsort(distances, axis=1, kind="stable")[:, : count - self.byzantine]
        weights = np.zeros((count, count))
        np.put_along_axis(weights, nearest, 1.0 / nearest.shape[1], axis=1)
        return stack.mixed(weights, [update.site for update in stack.updates])


@final
@dataclass(frozen=True)
class Bucketing(PreAggregation):
    """Means of random groups of ``size`` updates (Karimireddy, He and Jaggi, ICLR 2022).

    ⌈n / size⌉ updates are left, of which up to f hold a liar's: f / ⌈n / size⌉ must be what the rule after it stands.

    The groups follow from a hash of all updates, so that a run has the same bits on every engine and nobody knows them
    before the last update is in. A liar who knows all honest updates may try versions of his own until the groups suit
    him: with so strong an adversary in mind say ``secret=True``, whose draws no seed repeats.

    Attributes:
        size: Updates in a group; 2 in the paper's experiments.
        secret: Draw the groups from the operating system's randomness.
    """

    size: int = 2
    secret: bool = False

    def __post_init__(self) -> None:
        check_at_least("size", self.size, 1)

    def left(self, count: int) -> int:
        """The number of groups."""
        return -(-count // self.size)

    def shortage(self, count: int) -> str:  # noqa: ARG002
        """None: the rule after it says what it needs."""
        return ""

    def mix(self, stack: Stack) -> list[Update]:
        """Every group's mean."""
        count = len(stack)
        key = secrets.randbits(128) if self.secret else _digest(stack)
        by_name = np.array(sorted(range(count), key=lambda row: stack.updates[row].site))
        order = np.random.Generator(np.random.Philox(key=key)).permutation(by_name)
        weights = np.zeros((self.left(count), count))
        for group, row in enumerate(weights):
            members = order[group * self.size : (group + 1) * self.size]
            row[members] = 1.0 / len(members)
        return stack.mixed(weights, [f"group-{group + 1}" for group in range(len(weights))])


@final
@dataclass(frozen=True)
class PreAggregated(Aggregator):
    """A rule over updates that another method has mixed before.

    Attributes:
        rule: Any aggregator; mixed updates all weigh the same.
        by: ``NNM`` or ``Bucketing``.
    """

    needs: ClassVar[Needs] = "individual"

    rule: Aggregator
    by: PreAggregation

    def require(self, cohort: int) -> None:
        """What both need; the rule is asked about the updates that are left for it."""
        if reason := self.by.shortage(cohort):
            raise CompositionError(reason)
        self.rule.require(self.by.left(cohort))

    def init(self, parameters: Parameters) -> StateTree:
        """What the rule remembers."""
        return self.rule.init(parameters)

    def aggregate(self, updates: Iterable[Update]) -> Update:
        """The rule's aggregate of the mixed updates."""
        return self.rule.aggregate(self._mixed(updates))

    def step(self, updates: Iterable[Update], task: Task, state: StateTree) -> tuple[Update, StateTree]:
        """The rule's round over the mixed updates."""
        return self.rule.step(self._mixed(updates), task, state)

    def _mixed(self, updates: Iterable[Update]) -> list[Update]:
        stack = Stack.of(updates)
        enough(self.by.shortage(len(stack)), stack)
        return self.by.mix(stack)


def _digest(stack: Stack) -> int:
    found = hashlib.blake2b(digest_size=16)
    for update in sorted(stack.updates, key=lambda update: update.site):
        found.update(update.site.encode() + b"\0")
        for name, value in update.delta.items():
            found.update(f"{name}|{value.dtype.str}|{value.shape}\0".encode())
            for block in blocks(value):
                found.update(np.ascontiguousarray(block).data)
    return int.from_bytes(found.digest(), "little")

"""What a secure sum is that says no more than it must."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfl.core.aggregator import Aggregator, Sum, WeightedMean
from sfl.core.mechanism import DpEvent, Mechanism, Placement
from sfl.core.secure import Keeper, SecureSite, SecureSum, Step, Summing, Total
from sfl.core.task import SERVER, Task, Update
from sfl.core.transform import Transform
from sfl.errors import CompositionError
from sfl.io.site_store import SecretStore
from sfl.types import Parameters, StateTree


class Plain(SecureSum):
    """Adds up what everybody sees."""

    def require(self, cohort: int) -> None:
        """Any."""

    def begin(self, model: Parameters, sent: Parameters, sites: Sequence[str]) -> StateTree:
        return {}

    def summing(self, task: Task, cohort: Sequence[str], expected: Parameters, memory: StateTree) -> Summing:
        came = list((yield Step(dict.fromkeys(cohort, task), lambda update: None)))
        return Total(WeightedMean().aggregate(came), tuple(update.site for update in came))

    def identity(self, name: str, kit: Path) -> Any:
        return None

    def site(self, name: str, keeper: Keeper, identity: Any = None) -> SecureSite:
        raise NotImplementedError

    def described(self, cohort: int) -> list[str]:
        return []


def test_the_servers_half_is_driven_step_by_step() -> None:
    summing = Plain().summing(Task("fit", 1, {}), ["a", "b"], {}, None)
    step = next(summing)
    assert list(step.tasks) == ["a", "b"]
    with pytest.raises(StopIteration) as end:
        summing.send(iter([Update("a", {"w": np.ones(1)}, 1.0), Update("b", {"w": np.zeros(1)}, 3.0)]))
    assert end.value.value.mean.delta["w"] == 0.25
    assert end.value.value.figures == {}


def test_what_it_does_not_say_is_nothing() -> None:
    plain = Plain()
    assert (plain.heaviest, plain.among(3, 4), plain.remarks({"loss": 1.0})) == (math.inf, plain, [])
    arrays = {"w": np.ones(2)}
    assert (plain.seals, plain.keyed, plain.sealed(arrays)) == (False, False, {})
    assert plain.like(arrays) is plain.bare(arrays, {}) is arrays
    keeper = SecretStore(None)
    assert (plain.kits(["a"], keeper), plain.key(keeper)) == ({}, None)
    plain.check_server(Path("anywhere"))
    with pytest.raises(CompositionError, match="noise of whole numbers must come with secure aggregation by masks"):
        plain.on_grid(0.5, 1.0)


def test_what_follows_from_a_mean_alone() -> None:
    class Looks(Aggregator):
        def aggregate(self, updates: Any) -> Update:
            return next(iter(updates))

    mean = Update(SERVER, {"w": np.array([0.5])}, 4.0)
    assert WeightedMean().of_mean(mean) is mean
    assert Sum().of_mean(mean).delta["w"].tolist() == [2.0]
    assert Looks().of_mean(mean) is None


def test_a_mechanism_of_reals_is_on_no_grid() -> None:
    class Reals(Mechanism):
        @property
        def placement(self) -> Placement:
            return "central"

        def clip(self) -> Transform:
            raise NotImplementedError

        def noise(self) -> Transform:
            raise NotImplementedError

        def event(self, cohort: int, population: int) -> DpEvent:
            raise NotImplementedError

    assert (Reals().grid, Reals().reach(5)) == (0.0, 0.0)

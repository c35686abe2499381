"""What an algorithm adds to a site's own training."""

from typing import Any

import numpy as np
import pytest

from sfl.core.aggregator import Sum
from sfl.core.algorithm import Algorithm
from sfl.core.task import Task, Update
from sfl.core.terms import NO_TERMS, LocalTerms

W = {"w": np.array([2.0, -1.0]), "n": np.array(3)}


def test_a_task_names_the_terms() -> None:
    terms = LocalTerms.of({"proximal_mu": 0.5, "learning_rate_factor": 0.1, "seed": 3}, W)
    assert (terms.proximal_mu, terms.learning_rate_factor, terms.anchor, terms.drift) == (0.5, 0.1, W, None)
    assert LocalTerms.of({}, W).needs == frozenset()


@pytest.mark.parametrize(
    ("terms", "needs", "names"),
    [
        (NO_TERMS, set(), set()),
        (LocalTerms(0.5, W), {"proximal"}, {"proximal_mu"}),
        (LocalTerms(drift={}), {"drift"}, {"drift"}),
        (LocalTerms(learning_rate_factor=0.5), {"learning_rate"}, {"learning_rate_factor"}),
    ],
)
def test_what_a_client_must_heed_is_what_a_script_is_handed(terms: LocalTerms, needs: Any, names: Any) -> None:
    assert terms.needs == needs
    assert set(terms.named()) == names


def test_what_is_added_is_the_gradient_of_the_proximal_term_and_the_drift() -> None:
    anchor = {"w": np.array([1.0, 1.0]), "n": np.array(0)}

    def proximal(w: np.ndarray) -> float:
        return float(0.25 * np.sum((w - anchor["w"]) ** 2))  # μ/2 with μ = 0.5

    added = LocalTerms(0.5, anchor, drift={"w": np.array([10.0, 0.0])}).added(W)
    step = 1e-6 * np.eye(2)
    slope = [(proximal(W["w"] + e) - proximal(W["w"] - e)) / 2e-6 for e in step]
    np.testing.assert_allclose(added["w"], np.add(slope, [10.0, 0.0]), rtol=1e-6)
    assert added["n"] == 0
    assert added["n"].dtype == W["n"].dtype


def test_terms_that_say_nothing_add_zeros() -> None:
    assert all(not value.any() for value in NO_TERMS.added(W).values())
    assert not LocalTerms(0.5).added(W)["w"].any(), "without an anchor nothing pulls"


def test_what_most_aggregators_and_algorithms_ask_and_remember_is_nothing() -> None:
    aggregator = Sum()
    aggregator.require(1)
    assert aggregator.init(W) is None
    update, state = aggregator.step([Update("a", {"w": np.ones(2)}, 1.0)], Task("fit", 1, W), None)
    assert update.delta["w"].tolist() == [1.0, 1.0]
    assert state is None
    asks: Any = Algorithm.asks
    assert asks.fget(None) == frozenset()

"""Recipes: frozen, composed in one place, run anywhere."""

import dataclasses
from typing import Any

import numpy as np
import pytest

import clients
from sfl.core.aggregator import Sum, WeightedMean
from sfl.env import SimEnv
from sfl.errors import CompositionError, ConfigError
from sfl.recipe import FedAvgRecipe, SumRecipe
from sfl.server.app import run_sum, sum_recipe
from sfl.server.strategy import FedAvg, SumFedAvg
from sfl.types import FederationConfig


def recipe(**options: Any) -> FedAvgRecipe:
    options = {"name": "t", "client": clients.Base, "initial_parameters": {"w": np.zeros(2)}} | options
    return FedAvgRecipe(**options)


def test_a_recipe_is_frozen_and_its_parts_arrive_in_the_job() -> None:
    federation = FederationConfig(num_clients=5, fraction_fit=0.4, min_available_clients=2, seed=9)
    subject = recipe(federation=federation, server_learning_rate=0.5, evaluate_every=3, client_kwargs={"a": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        subject.name = "other"  # type: ignore[misc]
    job = subject.build()
    assert job.algorithm == FedAvg(fraction_fit=0.4, min_clients=2, server_learning_rate=0.5, seed=9)
    assert (job.name, job.federation, job.evaluate_every) == ("t", federation, 3)
    assert (job.program.client, job.program.kwargs) == (clients.Base, {"a": 1})
    assert (job.program.fixed_weight, job.program.share_metrics) == (None, True)
    assert isinstance(job.aggregator, WeightedMean)
    assert job.server_chain.transforms == job.program.chain.transforms == ()


def test_a_run_is_the_same_twice_and_leaves_the_recipe_alone() -> None:
    subject = recipe(client=clients.Wanderer, initial_parameters=clients.many_dtypes())
    one, two = (subject.execute(SimEnv(device="cpu")).parameters for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    assert {k: v.tobytes() for k, v in subject.build().initial().items()} == {
        k: v.tobytes() for k, v in clients.many_dtypes().items()
    }


def test_initial_parameters_may_be_made_when_they_are_needed() -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"w": np.ones(2)}

    subject = recipe(initial_parameters=make)
    subject.build()
    assert made == []
    assert subject.execute().parameters["w"].tolist() == [4.0, 4.0]
    assert made == [1]


def test_the_environment_may_bring_its_own_number_of_sites() -> None:
    result = recipe().execute(SimEnv(num_clients=5, device="cpu"))
    assert [s.site for s in result.rounds[1].sites if s.stage == "fit"] == [f"site-{n}" for n in range(1, 6)]


def test_noise_without_its_clip_is_refused() -> None:
    with pytest.raises(CompositionError, match="FixedNoise must come after a clip"):
        recipe(transforms=(clients.FixedNoise(),)).build()


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="device must be one that is there"):
        recipe().execute(SimEnv(device="cuda:77"))


@pytest.mark.parametrize(("workers", "named"), [(1, "in-process on cpu"), (2, "in-process, 2 workers on cpu")])
def test_the_federation_says_how_many_workers(workers: int, named: str) -> None:
    recorder = clients.Recorder()
    subject = recipe(client=clients.MyClient, federation=FederationConfig(num_rounds=1, workers=workers))
    subject.execute(SimEnv(device="cpu"), observers=(recorder,))
    assert recorder.events[0].engine == named


def test_the_smallest_example() -> None:
    assert run_sum(num_clients=3, num_rounds=2, base_secret=10.0) == 33.0
    job = sum_recipe(num_clients=4).build()
    assert isinstance(job.algorithm, SumFedAvg)
    assert isinstance(job.aggregator, Sum)
    assert isinstance(sum_recipe(), SumRecipe)


@pytest.mark.parametrize(
    "initial",
    [
        None,
        [np.zeros(2)],
        {"w": "text"},
        {"w": None},
        {"w": np.zeros(2, complex)},
        {"w": np.array([0.0, np.nan])},
        {"w": np.zeros(2, np.longdouble)},
        {1: np.zeros(2)},
        lambda: None,
        lambda: {"w": np.array([np.inf])},
    ],
    ids=range(10),
)
def test_initial_parameters_that_cannot_be_averaged_are_refused(initial: Any) -> None:
    with pytest.raises(ConfigError, match=r"^initial_parameters must be "):
        recipe(initial_parameters=initial).execute(SimEnv(device="cpu"))


def test_initial_parameters_become_arrays_of_this_machine() -> None:
    other = np.dtype(np.float32).newbyteorder("S")
    given = {"list": [1.0, 2.0], "number": 1.5, "swapped": np.ones(2, other)}
    for initial in (given, lambda: dict(given)):
        made = recipe(initial_parameters=initial).build().initial()
        assert {name: value.dtype.isnative for name, value in made.items()} == dict.fromkeys(given, True)
        assert {name: value.tolist() for name, value in made.items()} == {
            "list": [1.0, 2.0],
            "number": 1.5,
            "swapped": [1.0, 1.0],
        }


@pytest.mark.parametrize(
    "options", [{"evaluate_every": -1}, {"server_learning_rate": float("nan")}, {"server_learning_rate": float("inf")}]
)
def test_figures_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CompositionError, match=f"^{next(iter(options))} must be"):
        recipe(**options).build()


def test_an_environment_with_too_few_sites_is_refused_before_anything_runs() -> None:
    subject = recipe(federation=FederationConfig(num_clients=2, min_available_clients=2, num_rounds=1))
    with pytest.raises(CompositionError, match=r"at least min_available_clients=2 sites, got 1"):
        subject.execute(SimEnv(num_clients=1, device="cpu"))


@pytest.mark.parametrize(("option", "least"), [("num_clients", 1), ("num_threads", 0)])
def test_an_environment_says_what_its_numbers_must_be(option: str, least: int) -> None:
    SimEnv(**{option: least})
    with pytest.raises(ConfigError, match=f"{option} must be at least {least}, got {least - 1}"):
        SimEnv(**{option: least - 1})
